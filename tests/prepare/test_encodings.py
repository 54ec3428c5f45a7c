"""encodings.py: bytes that are not UTF-8 are called what they are."""

import re
from pathlib import Path

import numpy as np
import pytest

from prepare import prepare as room
from prepare.encodings import narrow_encoding, wide_encoding
from tests.prepare.test_not_text import GERMAN


@pytest.mark.parametrize(
    ("text", "encoding"), [("Привет, мир и все люди.\n", "cp1251"), ("これは日本語です。\n", "shift_jis")]
)
def test_other_encodings_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, encoding: str
) -> None:
    (tmp_path / "a.txt").write_bytes((text * 99).encode(encoding))
    assert room.main([str(tmp_path / "a.txt")]) == 2
    found = re.findall(r"iconv -f (\S+)", capsys.readouterr().err)
    assert (text * 99).encode(encoding).decode(found[0]) == text * 99


def test_damaged_utf8_is_not_taken_for_latin_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes(GERMAN.encode() + b"\xe4 and so on\n" + GERMAN.encode())
    assert room.main([str(tmp_path / "a.txt")]) == 2
    error = capsys.readouterr().err
    assert "the rest seems to be" in error
    assert "iconv" not in error


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff"])
@pytest.mark.parametrize("behind", [b"", b"\n", b"\xd0\x01", b"\0\xd8a\0", b"caf\xe9 \xcf\xf0\xe8\xe2\xe5\xf2"])
def test_what_begins_with_a_mark_of_utf_16_is_called_that_however_little_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mark: bytes, behind: bytes
) -> None:
    (tmp_path / "a.txt").write_bytes(mark + behind)
    assert room.main([str(tmp_path / "a.txt")]) == 2
    assert "seems to be UTF-16 text with a byte order mark: iconv -f UTF-16 -t utf-8" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["<u2", "<u4"])
def test_token_ids_are_not_taken_for_text_in_utf_16_or_utf_32(kind: str) -> None:
    assert wide_encoding(np.random.default_rng(0).integers(0, 50_257, 4_000).astype(kind).tobytes()) == ""


def test_bytes_that_windows_1252_lacks_make_it_latin_1_which_iconv_can_read() -> None:
    for data, encoding in ((b"caf\xe9 \x96 au lait", "WINDOWS-1252"), (b"caf\xe9 \x81 au lait", "ISO-8859-1")):
        assert narrow_encoding(data) == encoding
