"""This terminal as a pod's, over the API server's websocket: for machines without kubectl."""

import contextlib
import os
import select
import sys
import termios
import tty
from collections.abc import Iterator
from typing import Any

POLL_SECONDS = 0.05


def pass_through(socket: Any) -> int:
    """Keys to the pod and its output here, until either side ends. Returns an exit code."""
    keys = sys.stdin.fileno()
    with _raw(keys):
        while socket.is_open():
            socket.update(timeout=POLL_SECONDS)
            for output in (socket.read_stdout(timeout=0), socket.read_stderr(timeout=0)):
                if output:
                    sys.stdout.write(output)
                    sys.stdout.flush()
            if select.select([keys], [], [], 0)[0]:
                pressed = os.read(keys, 1024)
                if not pressed:  # Ctrl-D, or the end of a file
                    socket.write_stdin("\x04")
                    return _drain(socket)
                socket.write_stdin(pressed.decode(errors="replace"))
    return 0


def _drain(socket: Any) -> int:
    while socket.is_open():
        socket.update(timeout=POLL_SECONDS)
        sys.stdout.write(socket.read_stdout(timeout=0))
        sys.stdout.flush()
    return 0


@contextlib.contextmanager
def _raw(file: int) -> Iterator[None]:
    """A terminal that passes every key on, Ctrl-C too; what is no terminal stays as it is."""
    if not os.isatty(file):
        yield
        return
    before = termios.tcgetattr(file)
    try:
        tty.setraw(file)
        yield
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)
