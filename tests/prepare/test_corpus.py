"""corpus.py: the same text whatever holds it and however it is cut; clear words for what is no text."""

import contextlib
import gzip
import hashlib
import http.server
import json
import os
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prepare import corpus
from prepare.corpus import Layout, Reading
from prepare.sources import Source, find, sample
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


def zstd(data: bytes) -> bytes:
    return bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(data))


def parquet(path: Path, documents: list[str | None], column: str = "text") -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": list(range(len(documents))), column: documents}), path, row_group_size=2)


# --- what may hold text


@pytest.mark.parametrize("block", [1, 2, 3, 5, 1 << 20])
@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".txt.zst", ".log"])
def test_text_file_is_read_in_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, block: int
) -> None:
    monkeypatch.setattr(corpus, "PIECE_BYTES", block)
    data = TEXT.encode()
    pack = {".gz": gzip.compress, ".zst": zstd}.get(Path("a" + ending).suffix, bytes)
    path = tmp_path / f"a{ending}"
    path.write_bytes(pack(data))
    documents, [seen] = read(str(path))
    assert documents == [TEXT]
    assert seen == Input(str(path), 1, len(TEXT), len(data), hashlib.sha256(data).hexdigest())


def test_parts_of_a_packed_file_are_lost(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    (tmp_path / "b.txt.zst").write_bytes(zstd(b"one ") + zstd(b"two"))
    assert read(str(tmp_path))[0] == ["one two", "one two"]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("field", ["text", "body"])
def test_documents_of_rows_are_others(tmp_path: Path, ending: str, field: str) -> None:
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        parquet(path, [*DOCUMENTS[:2], None, "", DOCUMENTS[2]], field)
    else:
        pack = {".gz": gzip.compress, ".zst": zstd}.get(path.suffix, bytes)
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
def test_separated_documents_depend_on_the_blocks(documents: list[str], separator: str, block: int) -> None:
    data = separator.join(documents).encode()
    blocks: Iterator[bytes] = (data[i : i + block] for i in range(0, len(data), block))
    found: list[bytes] = []
    for _, at, begins, piece in corpus._separated(blocks, separator.encode()):
        assert data[at : at + len(piece)] == piece
        found = [*found, piece] if begins else [*found[:-1], found[-1] + piece]
    assert found == [document for document in data.split(separator.encode()) if document]


# --- which files are meant


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.txt", "deep/er/c.jsonl", "picture.png", ".hidden/d.txt", "e.md", "train.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(lines(["x"]))
    return tmp_path


def names(sources: list[Source], folder: Path) -> list[str]:
    return [source.name.removeprefix(f"{folder}/") for source in sources]


def test_folder_or_glob_gives_other_files(folder: Path) -> None:
    assert names(find([str(folder)]), folder) == ["a.txt", "b.txt", "deep/er/c.jsonl"]
    assert names(find([f"{folder}/*.txt"]), folder) == ["a.txt", "b.txt"]
    assert names(find([f"{folder}/**/*.jsonl"]), folder) == ["deep/er/c.jsonl"]
    assert names(find([f"{folder}/e.md", f"{folder}/b.txt", f"{folder}/a.txt"]), folder) == ["e.md", "b.txt", "a.txt"]
    (folder / "odd[1].txt").write_text("x")
    assert names(find([f"{folder}/odd[1].txt"]), folder) == ["odd[1].txt"]


@pytest.mark.parametrize("store", ["memory", "s3"])
def test_url_is_not_read_like_a_file(store: str, request: pytest.FixtureRequest) -> None:
    if store == "s3":
        request.getfixturevalue("s3_server")
    files, folder = fsspec.filesystem(store, skip_instance_cache=True), f"{store}://bucket/in"
    for name, data in (("b.txt", b"bee "), ("a.jsonl.gz", gzip.compress(lines(["ay"]))), ("n.png", b"no")):
        files.pipe(f"{folder}/{name}", data)
    try:
        assert read(f"{folder}/b.txt")[0] == ["bee "]
        assert read(f"{folder}/*.txt")[0] == ["bee "]
        assert read(folder)[0] == ["ay", "bee "]
        with pytest.raises(DataError, match=f"nothing to read at {folder}/none"):
            find([f"{folder}/none"])
        [source] = find([f"{folder}/b.txt"])
        files.pipe(f"{folder}/b.txt", b"bigger than before")
        with pytest.raises(DataError, match="changed since this run began"):
            list(Reading([source], Layout(), lambda _: None).pieces())
    finally:
        files.rm(folder, recursive=True)


@contextlib.contextmanager
def serving(handler: Any) -> Iterator[str]:
    """The address of a web server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_download_that_breaks_off_ends_in_a_traceback() -> None:
    class Broken(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()
            self.wfile.write(b"text " * 100)

        def answer(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "5000000")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with serving(Broken) as address, pytest.raises(DataError, match=f"{address}/a.txt cannot be read"):
        read(f"{address}/a.txt")


def test_address_on_the_web_is_not_read_like_a_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"bee ")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"sea"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with serving(partial(Quiet, directory=str(tmp_path))) as address:
        assert read(f"{address}/b.txt", f"{address}/c.txt.gz")[0] == ["bee ", "sea"]
        assert read(f"{address}/")[0] == ["bee ", "sea"]
        with pytest.raises(DataError, match=rf"{address}/none cannot be read \(404"):
            find([f"{address}/none"])
    with pytest.raises(DataError, match=f"{address}/b.txt cannot be read"):
        find([f"{address}/b.txt"])


@pytest.mark.parametrize("url", ["nosuch://a/b.txt", "https:///"])
def test_url_that_cannot_be_opened_ends_in_a_traceback(url: str) -> None:
    with pytest.raises(DataError, match=r"nosuch|https"):
        find([url])


def test_missing_file_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("x")
    with pytest.raises(DataError, match=r"no such file.*shakspeare\.txt.*did you mean .*shakespeare\.txt\?"):
        find([str(tmp_path / "shakspeare.txt")])
    with pytest.raises(DataError, match=r"no such file.*--sample"):
        find([str(tmp_path / "nowhere" / "a.txt")])
    with pytest.raises(DataError, match=r"no file matches .*\*\.text"):
        find([str(tmp_path / "*.text")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no \.txt, \.jsonl, \.parquet file"):
        find([str(tmp_path / "empty")])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"is a pipe or a device.*standard input"):
        find([str(tmp_path / "pipe")])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_found_out_hours_later(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").write_text("x")
    (tmp_path / "b.txt").chmod(0)
    with pytest.raises(DataError, match=r"b\.txt may not be read"):
        find([str(tmp_path)])


# --- what is wrong with it


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt.gz", b"\x1f\x8b\x08\x00", "cannot be unpacked"),
        ("a.txt.gz", b"plain text", "cannot be unpacked"),
        ("a.txt.gz", gzip.compress(b"text " * 999, mtime=0)[:-9], "cannot be unpacked"),
        ("a.txt.zst", b"plain text", "cannot be unpacked"),
        ("a.parquet", b"plain text", "cannot be read as Parquet"),
        ("a.jsonl", b'{"text": "good"}\n{"text": ', r"line 2 of .*a\.jsonl is no JSON object"),
        ("a.jsonl", b'{"text": "good"}\n["text"]', r"line 2 .* is no JSON object"),
        ("a.jsonl", b'{"text": 5}', r"line 1 .* with text in 'text'"),
        ("a.jsonl", b'{"body": "x"}', r"line 1 .* has no field 'text', it has body: choose with --text-field"),
    ],
)
def test_damaged_file_ends_in_a_traceback(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read(str(tmp_path / name))


def test_broken_lines_are_not_left_out_or_not_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": \nnull\n{"text": "two"}\n')
    documents, [seen] = read(str(tmp_path / "a.jsonl"), layout=Layout(lenient=True))
    assert (documents, seen.repaired) == (["one", "two"], 2)


def test_file_that_grows_while_it_is_read_is_mixed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"line\n" * 500_000)
    reading = Reading(find([str(path)]), Layout(), lambda _: None)
    pieces = reading.pieces()
    next(pieces)
    with path.open("ab") as file:
        file.write(b"one more\n")
    with pytest.raises(DataError, match=r"a\.txt changed while it was being read: try again"):
        list(pieces)


def test_missing_package_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("zstandard", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match="pip install zstandard"):
        read(str(tmp_path / "a.txt.zst"))
    with pytest.raises(DataError, match=r"pip install 'elastic-gpt\[parquet\]'"):
        read(str(tmp_path / "a.parquet"))


def test_sample_is_missing_or_changes_between_readings() -> None:
    first, second = (Reading([sample()], Layout(), lambda _: None) for _ in range(2))
    assert list(first.measured_pieces()) == list(second.pieces())
    [seen] = first.inputs([0])
    assert seen.documents > 50
    assert seen.bytes == sample().size > 300_000


@given(text=st.text(max_size=20), number=st.integers(0, 19))
def test_characters_are_miscounted(text: str, number: int) -> None:
    text = text.replace("\ud800", "")
    data = text.encode()
    assert corpus.count_characters(data) == len(text)
    if number < len(text):
        assert corpus.offset_of_character(data, number) == len(text[:number].encode())
