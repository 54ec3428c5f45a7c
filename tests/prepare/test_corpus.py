"""corpus.py: text as it is in the file, whatever the block borders; clear words for what is no text."""

import hashlib
import os
from pathlib import Path

import pytest

from prepare import corpus
from prepare.tokens import DataError


def read(path: Path) -> str:
    return "".join(corpus.pieces_of([corpus.text_file(path)]))


@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_character_cut_by_a_block_border_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    text = "aé漢👍\r\nb\ufeff\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    monkeypatch.setattr(corpus, "PIECE_BYTES", block)
    assert read(tmp_path / "a.txt") == text


@pytest.mark.parametrize(
    ("data", "at", "byte"),
    [
        (b"caf\xe9 au lait", "byte 3 ", "0xe9"),
        (b"ok \xe6\xbc", "byte 3 ", "0xe6"),
        (b"0123456789" * 10 + b"\xff", "byte 100 ", "0xff"),
        (b"surrogate \xed\xa0\x80", "byte 10 ", "0xed"),
    ],
)
@pytest.mark.parametrize("block", [2, 7, 1 << 20])
def test_bad_byte_is_named_at_the_wrong_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, at: str, byte: str, block: int
) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    monkeypatch.setattr(corpus, "PIECE_BYTES", block)
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.txt")
    assert at in str(caught.value)
    assert byte in str(caught.value)
    assert "iconv" in str(caught.value)


def test_measure_differs_from_the_file(tmp_path: Path) -> None:
    data = "línea uno\r\n二\n".encode()
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    told: list[int] = []
    seen = corpus.measure(corpus.text_file(path), told.append)
    assert (seen.name, seen.documents, seen.characters, seen.bytes) == (str(path), 1, len(data.decode()), len(data))
    assert seen.sha256 == hashlib.sha256(data).hexdigest()
    assert sum(told) == len(data)


def test_empty_file_passes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"a\.txt is empty"):
        corpus.measure(corpus.text_file(tmp_path / "a.txt"), lambda _: None)


def test_missing_file_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("x")
    with pytest.raises(DataError, match=r"no such file.*shakspeare\.txt.*did you mean .*shakespeare\.txt\?"):
        corpus.text_file(tmp_path / "shakspeare.txt")
    with pytest.raises(DataError, match=r"no such file.*--sample"):
        corpus.text_file(tmp_path / "nowhere" / "a.txt")


def test_folder_or_pipe_is_read_as_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder: name its files"):
        corpus.text_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"is a pipe or a device"):
        corpus.text_file(tmp_path / "pipe")


def test_sample_is_missing_or_changes_between_readings() -> None:
    first, second = (corpus.measure(corpus.sample(), lambda _: None) for _ in range(2))
    assert first == second
    assert first.documents > 50
    assert first.bytes > 300_000
