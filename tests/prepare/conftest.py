"""Texts, tokenizers and the folder of shared data for the tests of `prepare`."""

import socket
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2].parent / "shared"

ENGLISH = "The quick brown fox doesn't jump over 12 lazy dogs. " * 40 + "\n"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of test data that is not part of the project; tests that need it are skipped without it."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: it holds Tiny Shakespeare and the reference ranks of GPT-2")
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError("the test pulled the cable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text file to prepare, alone in its folder."""
    path = tmp_path / "text" / "data.txt"
    path.parent.mkdir()
    path.write_text(ENGLISH, encoding="utf-8")
    return path
