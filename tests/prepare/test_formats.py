"""formats.py: what a file is, told by its first bytes and its name."""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from backports import zstd

from prepare import prepare as room
from prepare.corpus import Layout, Reading
from prepare.data import read_meta
from prepare.formats import suffixes
from prepare.sources import find
from prepare.tokens import DataError

RECORDS = [{"text": f"Café number {i} is open", "id": i} for i in range(40)]
TEXTS = [str(record["text"]) for record in RECORDS]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS).encode()
INDENTED = json.dumps(RECORDS, indent=2).encode()
TABLE = ("id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS))).encode()
TABS = ("id\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(TEXTS))).encode()
BOM = b"\xef\xbb\xbf"
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def documents(path: Path, **options: str) -> list[str]:
    sources = find([str(path)], wanted=options.get("wanted", "auto"), field=options.get("field", "text"))
    found: list[bytes] = []
    for piece in Reading(sources, Layout(field=options.get("field", "text")), lambda _: None).pieces():
        found = [*found, piece.data] if piece.begins else [*found[:-1], found[-1] + piece.data]
    return [document.decode() for document in found]


# --- what is read


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("mark", [b"", BOM])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("A.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.json", ARRAY),
        ("a.JSON", INDENTED),
        ("a.jsonl", ARRAY),
        ("a", LINES),
        ("a", INDENTED),
        ("a.txt", LINES),
        ("a.csv", TABLE),
        ("A.Csv", TABLE.replace(b",", b";")),
        ("a.tsv", TABS),
        ("a", TABLE),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_records_are_read_whatever_holds_them(
    tmp_path: Path, name: str, data: bytes, mark: bytes, packing: str
) -> None:
    path = tmp_path / f"{name}{packing.upper() if name.isupper() else packing}"
    path.write_bytes(PACK[packing](mark + data))
    assert documents(path) == TEXTS


@pytest.mark.parametrize("packing", PACK)
def test_packing_is_told_by_the_bytes_and_not_the_name(tmp_path: Path, packing: str) -> None:
    for name in ("a.jsonl", "a.jsonl.gz", "a", "a.txt.zst"):
        (tmp_path / name).write_bytes(PACK[packing](LINES))
        assert documents(tmp_path / name) == TEXTS


def test_parquet_is_known_by_its_bytes(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name in ("a.parquet", "A.PARQUET", "a", "a.txt"):
        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / name)
        assert documents(tmp_path / name) == TEXTS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "{not json} says the text\n" * 9),
        ("a.txt", "[section]\nkey = value\n" * 9),
        ("a.md", "[a link](http://example.com) and more\n" * 9),
        ("a.py", "{'a': 1,\n 'b': [1, 2]}\nprint(x)\n" * 9),
        ("a.log", "[2026-01-01 10:00] INFO started\n" * 9),
        ("a.txt", '{"a": 1}\nand then prose that goes on\nfor lines\n'),
        ("a.txt", '{"a":\n1}\nand then prose that goes on\nfor lines\n'),
        ("a.txt", "[1, 2]\n"),
        ("a.txt", "[{x}] is a set\n" * 9),
        ("a.txt", "Some <html> and <p>snippets</p>, then text\n" * 9),
        ("a.md", "<p align='center'>title</p>\n\n# Markdown\n"),
        ("a.md", "<!-- a comment -->\n\n# Markdown\n"),
        ("a.txt", "MZ and BM and BZh9 begin this text\n" * 9),
        ("a.txt", "BZh9 and more\n" * 9),
        ("a.txt", "one, two, three\nfour, five, six\n" * 9),
        ("a.txt", "text, and not a table.\nIt has lines.\n" * 9),
        ("a.txt", "漢字かな交じり文\n" * 9),
        ("a.txt", "x"),
        ("a.txt", "one\0NUL in a text that is long enough\n" * 3),
        ("a.txt", "cut in a char" + "é" * 70000),
        ("a.txt", "xcut in a char" + "é" * 70000),
    ],
)
def test_text_stays_text(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    [source] = find([str(tmp_path / name)])
    assert source.kind == "text"
    assert documents(tmp_path / name) == [text]


def test_format_overrides_what_it_looks_like(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    assert documents(path, wanted="text") == [LINES.decode()]
    assert documents(path, wanted="json") == TEXTS
    path.write_bytes(TABLE)
    assert documents(path, wanted="csv") == TEXTS
    path.write_bytes(TABS)
    assert documents(path, wanted="tsv") == TEXTS
    path.write_bytes(b"<html>")
    assert documents(path, wanted="text") == ["<html>"]


def test_field_within_a_field_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": {"text": "deep"}}\n{"content.text": "flat", "content": {"text": "not this"}}\n')
    assert documents(path, field="content.text") == ["deep", "flat"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.gz", "-"])
@pytest.mark.parametrize("errors", ["strict", "skip"])
def test_byte_order_mark_is_not_part_of_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, errors: str
) -> None:
    text = {"a.jsonl": LINES, "a.csv": TABLE}.get(name, b"Some lines of text.\n" * 20)
    data = PACK[Path(name).suffix if name.endswith("gz") else ""](BOM + text)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    if name != "-":
        (tmp_path / name).write_bytes(data)
        name = str(tmp_path / name)
    out = tmp_path / "out"
    assert room.main([name, "--tokenizer", "char", "--errors", errors, "--output-dir", str(out)]) == 0
    [vocabulary] = (out / "tokenizer").iterdir()
    assert "\\ufeff" not in vocabulary.read_text() and "\ufeff" not in vocabulary.read_text()  # noqa: PT018
    [seen] = read_meta(out).inputs
    assert (seen.repaired, seen.bytes) == (0, len(text) if b"Some" in text else len("".join(TEXTS).encode()))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.JSONL.GZ", (".jsonl", ".gz")),
        ("http://h/a.jsonl?download=true&x=.txt", (".jsonl", "")),
        ("https://h/a.csv.zst#part", (".csv", ".zst")),
        ("http://h/?file=a.jsonl", ("", "")),
        ("s3://b/a?b.txt", (".txt", "")),
        ("odd?name.txt", (".txt", "")),
        (".gz", ("", ".gz")),
    ],
)
def test_ending_is_the_names_own(name: str, found: tuple[str, str]) -> None:
    assert suffixes(name) == found


def test_file_named_parquet_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("plain text")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        find([str(tmp_path / "a.parquet")])
