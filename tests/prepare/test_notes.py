"""notes.py: text that cannot be used is told with its place and the cure."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from prepare import prepare as room
from prepare.data import read_meta


def test_bytes_in_parquet_are_not_sent_through_iconv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["Käse".encode("latin-1")] * 99}), tmp_path / "a.parquet")
    assert room.main([str(tmp_path / "a.parquet"), "--output-dir", str(tmp_path / "out")]) == 2
    assert "row 1 has 0xe4: write the column as strings, or say --errors replace or skip" in capsys.readouterr().err


def test_halves_of_characters_are_joined_by_the_line_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "hi \U0001f600, né\n" * 100
    halves = text.encode("utf-16", "surrogatepass").decode("utf-16-le", "surrogatepass").removeprefix("\ufeff")
    halves = "".join(map(chr, memoryview(halves.encode("utf-16-le")).cast("H")))
    (tmp_path / "a.txt").write_bytes(halves.encode("utf-8", "surrogatepass"))
    monkeypatch.chdir(tmp_path)
    assert room.main(["a.txt"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "CESU-8, with a character as two halves" in line
    subprocess.run(line[line.index("python3") :], shell=True, check=True)
    assert (tmp_path / "a.utf8.txt").read_text() == text


def test_utf_16_behind_utf_8_is_told_as_files_that_were_joined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(b"a line\n" * 20_000 + "another\n".encode("utf-16"))
    assert room.main([str(tmp_path / "a.txt")]) == 2
    assert "byte 140,000 has 0xff, where UTF-16 text seems to begin: files were joined" in capsys.readouterr().err


def test_what_is_left_out_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"a": {"b": f"line {i} is here"}}) for i in range(30)]
    lines[4:4] = ['{"a": {"b": null}}', '{"a": {}}', '{"a": 5}', "{broken"]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    flags = ["--text-field", "a.b", "--errors", "skip", "--output-dir", str(tmp_path / "out")]
    assert room.main([str(tmp_path / "x.jsonl"), *flags]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    path = re.escape(str(tmp_path / "x.jsonl"))
    assert len(notes) == 2
    assert re.fullmatch(rf"note: 1 broken records left out \(first: {path}:8\)", notes[0])
    assert re.fullmatch(
        rf"note: 3 records without text in 'a\.b' left out: 2 missing, 1 null \(first: {path}:5\)", notes[1]
    )
    assert read_meta(tmp_path / "out").inputs[0].documents == 30


@pytest.mark.parametrize(
    ("text", "separator", "ends"),
    [
        ("A line.\n", r"\n\n", r"whose lines end with \n)"),
        ("A line.\r\n", r"\n\n", r"whose lines end with CRLF, \r\n: try '\r\n\r\n' or the like)"),
        ("A line.\r", r"\n\n", r"whose lines end with CR, \r: try '\r\r' or the like)"),
        ("No line. ", r"\n\n", "which has one line)"),
        ("A line.\n", r"\n", None),
    ],
)
def test_a_separator_that_divides_nothing_is_told_with_how_the_lines_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, separator: str, ends: str | None
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text * 40, newline="")
    flags = ["--tokenizer", "byte", "--separator", separator, "--output-dir", str(tmp_path / "out")]
    assert room.main([str(path), *flags]) == 0
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    told = f"note: --separator '{separator}' does not occur in 1 file, each of which is one document (first: {path}, {ends}"
    assert found == ([] if ends is None else [told])
