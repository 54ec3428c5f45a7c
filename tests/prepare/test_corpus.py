"""corpus.py: the same text in all formats and however it is cut; clear errors for what is not text."""

import gzip
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from prepare import corpus
from prepare.corpus import Layout, Reading
from prepare.sources import find, sample
from prepare.tokens import DataError, Input

TEXT = "línea uno\r\n漢字 👍\ufeff\n"
DOCUMENTS = ["First.\n", "Zweiter – längerer – Text.", "第三"]


def read(*names: str, layout: Layout = Layout()) -> tuple[list[str], list[Input]]:  # noqa: B008 - it is frozen
    """The documents of what `names` name, and how they were measured."""
    reading = Reading(find(names), layout, lambda _: None)
    documents: list[bytes] = []
    for piece in reading.measured_pieces():
        if piece.begins:
            documents.append(b"")
        documents[-1] += piece.data
    return [document.decode() for document in documents], reading.inputs([0] * len(find(names)))


def lines(documents: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, field: document}).encode() + b"\n" for document in documents)


def parquet(path: Path, documents: list[str | None], column: str = "text") -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": list(range(len(documents))), column: documents}), path, row_group_size=2)


# --- formats


@pytest.mark.parametrize("block", [1, 2, 3, 5, 1 << 20])
@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".txt.zst", ".log"])
def test_text_file_is_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, block: int) -> None:
    monkeypatch.setattr(corpus, "PIECE_BYTES", block)
    data = TEXT.encode()
    pack = {".gz": gzip.compress, ".zst": zstd.compress}.get(Path("a" + ending).suffix, bytes)
    path = tmp_path / f"a{ending}"
    path.write_bytes(pack(data))
    documents, [seen] = read(str(path))
    assert documents == [TEXT]
    assert seen == Input(str(path), 1, len(TEXT), len(data), hashlib.sha256(data).hexdigest())


def test_all_parts_of_a_packed_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    (tmp_path / "b.txt.zst").write_bytes(zstd.compress(b"one ") + zstd.compress(b"two"))
    assert read(str(tmp_path))[0] == ["one two", "one two"]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("field", ["text", "body"])
def test_documents_of_rows_are_those_written(tmp_path: Path, ending: str, field: str) -> None:
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        parquet(path, [*DOCUMENTS[:2], None, "", DOCUMENTS[2]], field)
    else:
        pack = {".gz": gzip.compress, ".zst": zstd.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(b"\n" + lines(["", *DOCUMENTS], field)))
    documents, [seen] = read(str(path), layout=Layout(field=field))
    assert documents == DOCUMENTS
    text = "".join(DOCUMENTS).encode()
    assert seen == Input(str(path), 3, len(text.decode()), len(text), hashlib.sha256(text).hexdigest())
    with pytest.raises(
        DataError, match=rf"has no (field|column) 'title', it has id, {field}: choose with --text-field"
    ):
        read(str(path), layout=Layout(field="title"))


@settings(max_examples=300)
@given(
    documents=st.lists(st.text("a\n|é", max_size=6), max_size=6),
    separator=st.sampled_from(["\n\n", "\n\n\n", "|", "|a|", "é"]),
    block=st.integers(1, 9),
)
def test_separated_documents_do_not_depend_on_the_blocks(documents: list[str], separator: str, block: int) -> None:
    data = separator.join(documents).encode()
    blocks: Iterator[bytes] = (data[i : i + block] for i in range(0, len(data), block))
    found: list[bytes] = []
    for _, at, begins, piece in corpus._separated(blocks, separator.encode()):
        assert data[at : at + len(piece)] == piece
        found = [*found, piece] if begins else [*found[:-1], found[-1] + piece]
    assert found == [document for document in data.split(separator.encode()) if document]


# --- errors


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt.gz", b"\x1f\x8b\x08\x00", "cannot be unpacked"),
        ("a.txt.gz", gzip.compress(b"text " * 999, mtime=0)[:-9], "cannot be unpacked"),
        ("a.txt.zst", zstd.compress(b"text")[:-1], "cannot be unpacked"),
        ("a.parquet", b"plain text", "cannot be read as Parquet"),
        ("a.jsonl", b'{"text": "good"}\n{"text": ', r"line 2 of .*a\.jsonl is not a JSON object"),
        ("a.jsonl", b'{"text": "good"}\n["text"]', r"line 2 .* is not a JSON object"),
        ("a.jsonl", b'{"text": 5}', r"line 1 .* with text in 'text'"),
        ("a.jsonl", b'{"body": "x"}', r"line 1 .* has no field 'text', it has body: choose with --text-field"),
    ],
)
def test_damaged_file_is_named_in_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read(str(tmp_path / name))


def test_broken_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": \nnull\n{"text": "two"}\n')
    documents, [seen] = read(str(tmp_path / "a.jsonl"), layout=Layout(lenient=True))
    assert (documents, seen.repaired) == (["one", "two"], 2)


def test_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"line\n" * 500_000)
    reading = Reading(find([str(path)]), Layout(), lambda _: None)
    pieces = reading.pieces()
    next(pieces)
    with path.open("ab") as file:
        file.write(b"one more\n")
    with pytest.raises(DataError, match=r"a\.txt changed while it was being read: try again"):
        list(pieces)


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"needs pyarrow to be read: pip install -e '.*\[parquet\]'"):
        read(str(tmp_path / "a.parquet"))


def test_sample_is_the_same_in_each_reading() -> None:
    first, second = (Reading([sample()], Layout(), lambda _: None) for _ in range(2))
    assert list(first.measured_pieces()) == list(second.pieces())
    [seen] = first.inputs([0])
    assert seen.documents > 50
    assert seen.bytes == sample().size > 300_000


@given(text=st.text(max_size=20), number=st.integers(0, 19))
def test_characters_are_counted(text: str, number: int) -> None:
    text = text.replace("\ud800", "")
    data = text.encode()
    assert corpus.count_characters(data) == len(text)
    if number < len(text):
        assert corpus.offset_of_character(data, number) == len(text[:number].encode())
