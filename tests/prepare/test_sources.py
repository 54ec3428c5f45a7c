"""sources.py: which files are read, and a line about those that are not."""

import contextlib
import gzip
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest

from prepare import prepare as room
from prepare.corpus import Layout, Reading
from prepare.data import read_meta
from prepare.sources import Source, find
from prepare.streams import TransferError
from prepare.tokens import DataError


def lines(*documents: str) -> bytes:
    return b"".join(json.dumps({"text": document}).encode() + b"\n" for document in documents)


def read(*names: str) -> list[str]:
    """The documents of what `names` name."""
    found: list[bytes] = []
    for piece in Reading(find(names), Layout(), lambda _: None).pieces():
        found = [*found, piece.data] if piece.begins else [*found[:-1], found[-1] + piece.data]
    return [document.decode() for document in found]


def told(*names: str) -> tuple[list[str], list[str]]:
    """The names of the sources that `names` name, and what is said of others."""
    notes: list[str] = []
    return [source.name for source in find(names, say=notes.append)], notes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.txt", "deep/er/c.jsonl", "picture.png", ".hidden/d.txt", "e.md", "train.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(lines("x"))
    return tmp_path


def names(sources: list[Source], folder: Path) -> list[str]:
    return [source.name.removeprefix(f"{folder}/") for source in sources]


def test_folder_and_glob_give_files_in_order(folder: Path) -> None:
    assert names(find([str(folder)]), folder) == ["a.txt", "b.txt", "deep/er/c.jsonl"]
    assert names(find([f"{folder}/*.txt"]), folder) == ["a.txt", "b.txt"]
    assert names(find([f"{folder}/**/*.jsonl"]), folder) == ["deep/er/c.jsonl"]
    assert names(find([f"{folder}/e.md", f"{folder}/b.txt", f"{folder}/a.txt"]), folder) == ["e.md", "b.txt", "a.txt"]
    (folder / "odd[1].txt").write_text("x")
    assert names(find([f"{folder}/odd[1].txt"]), folder) == ["odd[1].txt"]


@pytest.mark.parametrize("store", ["memory", "s3"])
def test_url_is_read_like_a_file(store: str, request: pytest.FixtureRequest) -> None:
    if store == "s3":
        request.getfixturevalue("s3_server")
    files, folder = fsspec.filesystem(store, skip_instance_cache=True), f"{store}://bucket/in"
    for name, data in (("b.txt", b"bee "), ("a.jsonl.gz", gzip.compress(lines("ay"))), ("n.png", b"no")):
        files.pipe(f"{folder}/{name}", data)
    try:
        assert read(f"{folder}/b.txt") == ["bee "]
        assert read(f"{folder}/*.txt") == ["bee "]
        assert read(folder) == ["ay", "bee "]
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


def test_download_that_breaks_off_is_named() -> None:
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

    with serving(Broken) as address, pytest.raises(TransferError, match=f"{address}/a.txt cannot be read"):
        read(f"{address}/a.txt")


def test_address_on_the_web_is_read_like_a_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"bee ")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"sea"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with serving(partial(Quiet, directory=str(tmp_path))) as address:
        assert read(f"{address}/b.txt", f"{address}/c.txt.gz") == ["bee ", "sea"]
        assert read(f"{address}/") == ["bee ", "sea"]
        with pytest.raises(DataError, match=rf"{address}/none cannot be read \(404"):
            find([f"{address}/none"])
    with pytest.raises(TransferError, match=f"{address}/b.txt cannot be read"):
        find([f"{address}/b.txt"])


@pytest.mark.parametrize("url", ["nosuch://a/b.txt", "https:///"])
def test_url_that_cannot_be_opened_is_named(url: str) -> None:
    with pytest.raises(DataError, match=r"nosuch|https"):
        find([url])


def test_missing_file_is_guessed(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("x")
    with pytest.raises(DataError, match=r"no such file.*shakspeare\.txt.*did you mean .*shakespeare\.txt\?"):
        find([str(tmp_path / "shakspeare.txt")])
    with pytest.raises(DataError, match=r"no such file.*--sample"):
        find([str(tmp_path / "nowhere" / "a.txt")])
    with pytest.raises(DataError, match=r"no file matches .*\*\.text"):
        find([str(tmp_path / "*.text")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no \.txt, .*\.parquet.* file in it: name the files"):
        find([str(tmp_path / "empty")])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"is a pipe or a device.*standard input"):
        find([str(tmp_path / "pipe")])


# --- what is left out is told


def test_links_to_folders_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "real" / "deep" / "big.txt").write_text("big")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "small.txt").write_text("small")
    (tmp_path / "c" / "sub").symlink_to("../real")
    (tmp_path / "real" / "deep" / "up").symlink_to("../../c")
    (tmp_path / "real" / "self").symlink_to(".")
    found, notes = told(str(tmp_path / "c"))
    assert names_below(found, tmp_path) == ["c/small.txt", "c/sub/deep/big.txt"]
    [note] = notes
    assert note.startswith("2 left out: links to a folder that is read already (first: ")


def names_below(found: list[str], folder: Path) -> list[str]:
    return [name.removeprefix(f"{folder}/") for name in found]


def test_each_kind_that_is_left_out_is_one_line_with_number_and_first(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "c.png", ".hidden.txt", "sub/.git/x.txt", "sub/train.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "gone.txt").symlink_to("/nowhere/x.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.txt"))
    (tmp_path / "info.json").write_text('{\n "rows": 5\n}\n')
    found, notes = told(str(tmp_path))
    assert names_below(found, tmp_path) == ["a.txt", "sub/train.txt"]
    assert sorted(note.replace(f"{tmp_path}/", "") for note in notes) == [
        "1 left out: files of one JSON object in many lines, which may describe the others (first: info.json)",
        "1 left out: links to nothing (first: gone.txt)",
        "2 left out: empty files (first: empty.jsonl)",
        "2 left out: files of other endings (first: b.md)",
        "2 left out: hidden files and folders (first: .hidden.txt)",
        "2 left out: pipes, sockets and devices (first: pipe.txt)",
    ]


def test_notes_come_after_everything_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("some text that is long enough\n" * 20)
    (tmp_path / "in" / "gone.txt").symlink_to("/nowhere/x.txt")
    assert room.main([str(tmp_path / "in"), "--output-dir", str(tmp_path / "out")]) == 0
    assert capfd.readouterr().err.splitlines()[-1].startswith("note: 1 left out: links to nothing (first: ")


def test_what_prepare_wrote_is_not_read_as_input(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text that is long enough\n" * 20)
    for _ in range(2):
        assert room.main([str(tmp_path), "--tokenizer", "char"]) == 0
        assert [source.name for source in read_meta(tmp_path).inputs] == [str(tmp_path / "a.txt")]


def test_pattern_tells_what_it_matches_and_does_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "folder").mkdir()
    (tmp_path / "gone").symlink_to("/nowhere/x.txt")
    found, notes = told(f"{tmp_path}/*")
    assert names_below(found, tmp_path) == ["a.txt"]
    assert [note.replace(f"{tmp_path}/", "") for note in notes] == [
        "1 left out: folders, into which only ** goes (first: folder)",
        "1 left out: links to nothing (first: gone)",
    ]
    with pytest.raises(DataError, match=r"no file matches \S+/fol\* \(but 1 folders, into which"):
        find([f"{tmp_path}/fol*"])


def test_file_that_is_read_twice_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to("a.txt")
    name = str(tmp_path / "a.txt")
    assert told(name)[1] == []
    found, [note] = told(name, str(tmp_path / "b.txt"), name)
    assert len(found) == 3
    assert note == f"2 files are read more than once, for they were named so (first: {tmp_path}/b.txt)"


def test_dangling_link_and_loop_of_links_are_named(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to("/nowhere/x.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    with pytest.raises(DataError, match=r"gone\.txt is a link to /nowhere/x\.txt, which is not there"):
        find([str(tmp_path / "gone.txt")])
    assert room.main([str(tmp_path / "loop.txt"), "--output-dir", str(tmp_path / "out")]) == 2


@pytest.fixture
def barred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A tree in which a user without rights may read one file, and the working directory is above it."""
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tree").mkdir()
    (tmp_path / "private").mkdir()
    for name in ("tree/a.txt", "tree/b.txt", "private/c.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / "tree/file.txt").symlink_to("../private/c.txt")
    (tmp_path / "tree/folder").symlink_to("../private")
    (tmp_path / "tree/closed").mkdir()
    (tmp_path / "tree/listed").mkdir()
    for name, mode in {"tree/b.txt": 0, "tree/closed": 0, "tree/listed": 0o444, "private": 0}.items():
        (tmp_path / name).chmod(mode)
    yield
    for name in ("tree/closed", "tree/listed", "private"):
        (tmp_path / name).chmod(0o755)


def as_nobody(*names: str) -> tuple[list[str], list[str]]:
    """What a user without rights finds and is told, an error too."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        notes: list[str] = []
        try:
            found = [source.name for source in find(names, say=notes.append)]
        except Exception as error:
            found = []
            notes.append(f"{type(error).__name__}: {error}")
        os.write(writing, json.dumps([found, notes]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        found, notes = json.load(answer)
    os.waitpid(child, 0)
    return found, notes


@pytest.mark.usefixtures("barred")
@pytest.mark.parametrize(
    ("name", "found", "notes"),
    [
        (
            "tree",
            ["tree/a.txt"],
            [
                "2 left out: files that this user may not read (first: tree/b.txt)",
                "3 left out: folders that this user may not read (first: tree/closed)",
            ],
        ),
        ("tree/*.txt", ["tree/a.txt"], ["2 left out: files that this user may not read (first: tree/b.txt)"]),
        (
            "tree/**",
            ["tree/a.txt"],
            [
                "3 left out: folders that this user may not read (first: tree/closed)",
                "2 left out: files that this user may not read (first: tree/b.txt)",
            ],
        ),
        (
            "tree/*/*.txt",
            [],
            [
                "3 left out: folders that this user may not read (first: tree/closed)",
                "DataError: no file matches tree/*/*.txt (but 3 folders that this user may not read):"
                " check the pattern; ** goes into folders",
            ],
        ),
    ],
)
def test_what_this_user_may_not_read_of_several_is_counted(name: str, found: list[str], notes: list[str]) -> None:
    assert as_nobody(name) == (found, notes)


@pytest.mark.usefixtures("barred")
@pytest.mark.parametrize("name", ["tree/b.txt", "tree/file.txt", "tree/folder", "tree/closed", "private/c.txt"])
def test_a_named_file_that_may_not_be_read_is_an_error(name: str) -> None:
    told = f"DataError: {name} may not be read by this user: chmod a+rX it and the folders above, or leave it out"
    assert as_nobody(name) == ([], [told])
    assert as_nobody("tree/a.txt", name)[1] == [told]


@pytest.mark.parametrize(
    ("name", "behind", "note"),
    [
        ("a.txt.gz", b"", "{} is called .gz, but is not packed: it is read as it is"),
        ("a.txt", b"\0 ok", "{} has NUL bytes: they are read as characters"),
    ],
)
def test_what_is_read_though_it_is_odd_is_told(tmp_path: Path, name: str, behind: bytes, note: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"A line of text that is here.\n" * 30 + behind)
    assert told(str(path)) == ([str(path)], [note.format(path)])


# --- names and places


def test_file_name_that_is_not_utf8_is_written_as_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "caf\udce9.txt"
    path.write_text("some text that is long enough\n" * 20)
    assert room.main([str(path), "--output-dir", str(tmp_path / "out")]) == 0
    assert [source.name for source in read_meta(tmp_path / "out").inputs] == [f"{tmp_path}/caf\\xe9.txt"]
    path.write_bytes(b"\xff\xfeb\0a\0d\0 \0")
    assert room.main([str(path), "--output-dir", str(tmp_path / "out")]) == 2
    [*_, line] = capsys.readouterr().err.splitlines()
    assert line.isprintable()


@pytest.mark.parametrize("name", ["café.txt", "caf\udce9.txt"])
def test_locale_of_c_is_enough(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("some text that is long enough, né\n" * 20, encoding="utf-8")
    command = [sys.executable, room.__file__, name, "--tokenizer", "char", "--output-dir", "out-é", "--verify"]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert (run.returncode, run.stderr.count(b"Traceback")) == (0, 0)
    assert b"is in order" in run.stdout


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("some words")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="an input has no name"):
        find([""])
