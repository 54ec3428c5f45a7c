"""whole.py: --verify finds inputs that are not whole, even if the reader that prepared them overlooked it."""

import hashlib
from pathlib import Path

import pytest
from backports import zstd

from prepare import prepare as room
from prepare import streams
from prepare.sources import find
from prepare.tokens import Input
from prepare.whole import inputs_whole
from tests.prepare.test_streams import CASES, PACKED, TEXT


@pytest.mark.parametrize(("ending", "data", "_message"), CASES)
def test_verify_sees_damage_that_a_blind_reader_overlooks(
    tmp_path: Path, ending: str, data: bytes, _message: str
) -> None:
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACKED[ending](TEXT))
    [source] = find([str(path)])
    text = Input(source.name, 1, len(TEXT), len(TEXT), hashlib.sha256(TEXT).hexdigest())
    assert [finding.good for finding in inputs_whole([source], [text], same_text=True)] == [True]
    path.write_bytes(data)
    [source] = [type(source)(source.name, source.place, len(data), packing=source.packing)]
    [wrong, _] = inputs_whole([source], [text], same_text=True)
    assert wrong.good is False
    assert source.name in wrong.text


def test_verify_sees_text_that_was_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reader that stops after the first member and finds nothing wrong."""
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstd.compress(TEXT) + zstd.compress(TEXT))
    begin = streams._Unpacked._begin
    monkeypatch.setattr(streams._Unpacked, "_begin", lambda self: not self._members and begin(self))
    assert room.main([str(path), "--tokenizer", "byte", "--verify"]) == 1
    assert f"has {2 * len(TEXT):,} bytes of text, of which {len(TEXT):,} were read" in capsys.readouterr().out
