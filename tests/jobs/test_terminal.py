"""terminal.py: a pod's terminal without kubectl."""

import json
import os
import pty
import sys
import termios
from typing import Any

import pytest

from elastic_gpt.jobs.terminal import pass_through


class Socket:
    """What kubernetes.stream hands out. The pod says `prompt > ` and answers a line in capitals, until it reads `exit`.

    Args:
        keyboard: where a person types, a piece at each look.
    """

    def __init__(self, keyboard: int, pieces: list[bytes]) -> None:
        self.keyboard, self.pieces = keyboard, pieces
        self.out, self.typed, self.open = b"prompt > ", b"", True
        self.sizes: list[dict[str, int]] = []

    def is_open(self) -> bool:
        return self.open

    def update(self, **_: float) -> None:
        if self.pieces:
            os.write(self.keyboard, self.pieces.pop(0))

    def read_stdout(self, **_: float) -> bytes:
        said, self.out = self.out[:10], self.out[10:]
        return said

    def write_stdin(self, text: bytes) -> None:
        self.typed += text
        self.open = not self.typed.endswith((b"exit\r", b"\x04"))
        if text.endswith(b"\r"):
            self.out += text.decode().upper().encode() + b"prompt > "

    def write_channel(self, channel: int, text: str) -> None:
        assert channel == 4
        self.sizes.append(json.loads(text))


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The other side of the terminal that the command runs in."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "r", closefd=False) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        yield ours, theirs
    os.close(ours)
    os.close(theirs)


def test_keys_go_to_the_pod_one_by_one_and_the_terminal_is_as_before(
    keys: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = keys
    termios.tcsetwinsize(theirs, (24, 80))
    before = termios.tcgetattr(theirs)
    keyed = ["tschüß\r".encode(), b"", b"", b"\x03", b"exit\r"]  # Ctrl-C is the pod's, not this process's
    socket = Socket(ours, keyed)
    assert pass_through(socket) == 0
    assert socket.typed == "tschüß\r\x03exit\r".encode()
    assert capsys.readouterr().out.startswith("prompt > TSCHÜSS")
    # The pod sees a change, upon which it writes its prompt again, and ends with the size there is.
    assert socket.sizes == [{"Width": 81, "Height": 24}, {"Width": 80, "Height": 24}]
    assert termios.tcgetattr(theirs) == before
