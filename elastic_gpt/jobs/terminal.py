"""Connects this terminal with a pod, over a websocket of the API server, for machines without kubectl."""

import contextlib
import json
import os
import select
import sys
import termios
import tty
from collections.abc import Iterator
from typing import Any

POLL_SECONDS = 0.05
SIZE_CHANNEL = 4  # in Kubernetes' protocol v4.channel.k8s.io


def pass_through(socket: Any) -> int:
    """Send keys to the pod and print its output, until either side ends. Returns an exit code."""
    keys, size = sys.stdin.fileno(), None
    with _raw(keys):
        while socket.is_open():
            if os.isatty(keys) and (now := os.get_terminal_size(keys)) != size:
                if size is None:  # a new size makes the pod write its prompt again, which may have been there before us
                    _tell_size(socket, now.columns + 1, now.lines)
                _tell_size(socket, now.columns, now.lines)
                size = now
            _show(socket)
            if select.select([keys], [], [], 0)[0]:
                pressed = os.read(keys, 1024)
                if not pressed:  # end of input: Ctrl-D
                    socket.write_stdin(b"\x04")
                    break
                socket.write_stdin(pressed)
        while socket.is_open():
            _show(socket)
    return 0


def _show(socket: Any) -> None:
    socket.update(timeout=POLL_SECONDS)
    if output := socket.read_stdout(timeout=0):  # as bytes, since a piece may end inside a character
        sys.stdout.buffer.write(output)
        sys.stdout.buffer.flush()


def _tell_size(socket: Any, columns: int, rows: int) -> None:
    socket.write_channel(SIZE_CHANNEL, json.dumps({"Width": columns, "Height": rows}))


@contextlib.contextmanager
def _raw(file: int) -> Iterator[None]:
    """Let a terminal pass on every key, even Ctrl-C. Other files stay as they are."""
    if not os.isatty(file):
        yield
        return
    before = termios.tcgetattr(file)
    try:
        tty.setraw(file)
        yield
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)
