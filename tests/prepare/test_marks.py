"""marks.py: a byte order mark before a line is left out, wherever it is cut; one within a line stays. Both are told."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prepare import prepare as room
from prepare.data import load_tokenizer, open_split, read_meta
from prepare.marks import BOM, Marks, without_marks

JOINED = [f"Line {number} of a text that is long enough.\n" for number in range(99)]


@settings(max_examples=500)
@given(text=st.text("\ufeff\n\ra é", max_size=12), size=st.integers(1, 5))
def test_marks_before_lines_go_and_others_stay_however_the_text_is_cut(text: str, size: int) -> None:
    data = text.encode()
    marks = Marks()
    cut = ((0, at, at == 0, data[at : at + size]) for at in range(0, len(data), size))
    found = list(without_marks(cut, marks))
    expected = ""
    for character in text:
        if character != "\ufeff" or expected[-1:] not in ("", "\n", "\r"):
            expected += character
    assert b"".join(part for *_, part in found).decode() == expected
    assert all(data[at : at + len(part)] == part for _, at, _, part in found)
    assert [begins for _, _, begins, _ in found] == [True] * bool(expected) + [False] * (len(found) - 1)
    assert (marks.dropped, marks.kept) == (len(text) - len(expected), expected.count("\ufeff"))
    if marks:
        assert marks.first == (0, data.index(BOM))


def write(path: Path, mark: str) -> None:
    """Files that were joined, each of which began with `mark`; the second text has one within a line as well."""
    texts = ["".join(JOINED[:50]), "".join(JOINED[50:]) + f"wor{mark}ds\n"]
    if path.suffix == ".csv":
        data = f'{mark}text,id\n"{texts[0]}",1\n{mark}"{texts[1]}",2\n'
    elif path.suffix == ".jsonl":
        data = "".join(mark + json.dumps({"text": mark + text}) + "\n" for text in texts)
    else:
        data = "".join(mark + text for text in texts)
    path.write_text(data, encoding="utf-8", newline="")


@pytest.mark.parametrize(
    ("name", "engine", "options"),
    [
        ("a.txt", "fast", ()),
        ("a.txt", "tiktoken", ()),
        ("a.txt", "tiktoken", ("--separator", r"\n\n")),
        ("a.csv", "tiktoken", ()),
        ("a.jsonl", "tiktoken", ()),
        ("a.parquet", "tiktoken", ()),
    ],
)
def test_joined_files_give_the_text_without_marks_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, engine: str, options: tuple[str, ...]
) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        texts = ["\ufeff" + "".join(JOINED[:50]), "\ufeff" + "".join(JOINED[50:]) + "wor\ufeffds\n"]
        parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        write(path, "\ufeff")
    out = tmp_path / "out"
    words = [str(path), "--verify", "--engine", engine, "--workers", "1", "--val-fraction", "0.3", *options]
    assert room.main([*words, "--output-dir", str(out)]) == 0
    said = capsys.readouterr()
    assert " at the beginning of lines left out, 1 within lines kept as characters of the text (first: " in said.err
    tokenizer = load_tokenizer(out)
    meta = read_meta(out)
    ids = [i for split in ("train", "val") for i in open_split(out, split).tolist() if i != meta.eot_id]
    assert tokenizer.decode(ids) == "".join(JOINED) + "wor\ufeffds\n"
    if name == "a.txt" and not options:
        assert "1 are the text that was read" in said.out + said.err


def test_a_text_of_marks_alone_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes(BOM * 5)
    assert room.main([str(tmp_path / "a.txt"), "--output-dir", str(tmp_path / "out")]) == 2
    assert "is empty" in capsys.readouterr().err
