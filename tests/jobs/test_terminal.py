"""A pod's terminal, without kubectl."""

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
        self.out, self.typed, self.open = "prompt > ", "", True

    def is_open(self) -> bool:
        return self.open

    def update(self, **_: float) -> None:
        if self.pieces:
            os.write(self.keyboard, self.pieces.pop(0))

    def read_stdout(self, **_: float) -> str:
        said, self.out = self.out, ""
        return said

    def read_stderr(self, **_: float) -> str:
        return ""

    def write_stdin(self, text: str) -> None:
        self.typed += text
        self.open = not self.typed.endswith(("exit\r", "\x04"))
        if text.endswith("\r"):
            self.out += text.upper() + "prompt > "


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The other side of the terminal that the command runs in."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "r", closefd=False) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        yield ours, theirs
    os.close(ours)
    os.close(theirs)


@pytest.mark.timeout(30)
def test_keys_go_to_the_pod_one_by_one_and_the_terminal_is_as_before(
    keys: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = keys
    before = termios.tcgetattr(theirs)
    socket = Socket(ours, [b"hello\r", b"\x03", b"exit\r"])  # Ctrl-C is the pod's, not this process's
    assert pass_through(socket) == 0
    assert socket.typed == "hello\r\x03exit\r"
    assert capsys.readouterr().out.startswith("prompt > HELLO")
    assert termios.tcgetattr(theirs) == before
