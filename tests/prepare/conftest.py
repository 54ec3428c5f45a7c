"""Texts, tokenizers and the folder of shared data for the tests of `prepare`."""

import socket
from pathlib import Path

import pytest

from tests.conftest import TEST_DATA

ENGLISH = "The quick brown fox doesn't jump over 12 lazy dogs. " * 40 + "\n"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of test data that is not part of the project; tests that need it are skipped without it."""
    if not TEST_DATA.is_dir():
        pytest.skip(
            f"no {TEST_DATA}: TEST_DATA names a folder with tinyshakespeare.txt and gpt2.tiktoken (CONTRIBUTING.md)"
        )
    return TEST_DATA


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
