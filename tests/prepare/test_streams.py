"""streams.py: a stream that is not whole is an error that names file and place."""

import contextlib
import http.server
import io
import re
import subprocess
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backports import zstd

from prepare import prepare as room
from prepare import streams
from prepare.sources import find
from prepare.streams import TransferError, opened, packing_of
from prepare.tokens import DataError
from prepare.whole import inputs_whole
from tests.prepare.test_formats import PACK

TEXT = b"".join(b"%d sheep went over the %dth hill.\n" % (i, i * 7919 % 1013) for i in range(6000))
PACKED = {ending: pack for ending, pack in PACK.items() if ending}


def read(path: Path) -> bytes:
    with opened(str(path), path.name, path.stat().st_size, None) as file:
        return file.read()


@pytest.mark.parametrize("ending", PACKED)
def test_all_members_are_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(b"".join(PACKED[ending](part) for part in (TEXT, b"", b"second", TEXT)))
    assert read(path) == TEXT + b"second" + TEXT
    if ending in (".gz", ".xz"):
        path.write_bytes(PACKED[ending](TEXT) + bytes(512))  # as tapes pad
        assert read(path) == TEXT


def damaged(ending: str) -> Iterator[tuple[str, bytes, str]]:
    """Ways in which a file is not whole, and what is said of it."""
    one, two = PACKED[ending](TEXT), PACKED[ending](TEXT[:5000])
    cut = "cannot be unpacked: it ends in the middle"
    yield "cut in the middle", one[: len(one) // 2], cut
    yield "without its last byte", one[:-1], cut
    yield "cut in the second member", one + two[: len(two) // 2], cut
    yield "cut in the second member's header", one + two[:3], cut
    yield "with garbage behind it", one + b"<html>not found</html>\n" * 9, r"what follows 1 whole \w+ stream"
    yield "with a line break behind it", one + b"\n", r"what follows 1 whole \w+ stream"
    middle = len(one) // 2
    flipped = one[:middle] + bytes([one[middle] ^ 0x55]) + one[middle + 1 :]
    yield "with a changed byte in the middle", flipped, "cannot be unpacked"


def with_checksums(data: bytes) -> bytes:
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})


PACKED[".zst"] = with_checksums  # as the command line does it
CASES = [
    pytest.param(ending, data, message, id=f"{ending} {what}")
    for ending in PACKED
    for what, data, message in damaged(ending)
]


@pytest.mark.parametrize("errors", ["strict", "skip"])
@pytest.mark.parametrize(("ending", "data", "message"), CASES)
def test_damage_is_an_error_whatever_errors_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str, data: bytes, message: str, errors: str
) -> None:
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(data)
    flags = ["--tokenizer", "byte", "--errors", errors, "--verify", "--output-dir", str(tmp_path / "out")]
    assert room.main([str(path), *flags]) == 2
    [*_, line] = capsys.readouterr().err.splitlines()
    assert re.match(
        rf"error: {re.escape(str(path))} {message if message.startswith('cannot') else '.*' + message}", line
    )
    assert re.search(r"byte \d|after [\d,]+ bytes", line)
    assert not (tmp_path / "out" / "meta.json").exists()


@pytest.mark.parametrize("cut", [4, 900, 40_000])
@pytest.mark.parametrize("errors", ["strict", "skip"])
def test_truncated_parquet_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: int, errors: str
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"row {i} {i * 7919 % 1013}" for i in range(9000)]})
    parquet.write_table(table, path, write_page_checksum=True, use_dictionary=False)
    whole = path.read_bytes()
    [source] = find([str(path)])
    path.write_bytes(whole[:-cut])
    assert room.main([str(path), "--errors", errors]) == 2
    assert re.search(r"error: \S+a\.parquet cannot be read as Parquet \(", capsys.readouterr().err)
    source = type(source)(source.name, source.place, len(whole) - cut, kind="parquet")
    assert [finding.good for finding in inputs_whole([source], [], same_text=True)] == [False, True]
    middle = len(whole) // 3
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert room.main([str(path), "--errors", errors]) == 2
    assert "a.parquet cannot be read as Parquet" in capsys.readouterr().err


def test_long_window_of_zstd_is_read(tmp_path: Path) -> None:
    long = {zstd.CompressionParameter.window_log: 28, zstd.CompressionParameter.enable_long_distance_matching: 1}
    (tmp_path / "a.zst").write_bytes(zstd.ZstdCompressor(options=long).compress(TEXT, zstd.ZstdCompressor.FLUSH_FRAME))
    # So that the frame does not say how long it is, and the window counts:
    compressor = zstd.ZstdCompressor(options=long)
    (tmp_path / "b.zst").write_bytes(compressor.compress(TEXT) + compressor.compress(TEXT) + compressor.flush())
    assert read(tmp_path / "a.zst") == TEXT
    assert read(tmp_path / "b.zst") == TEXT + TEXT
    with pytest.raises(zstd.ZstdError):
        zstd.decompress((tmp_path / "b.zst").read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("ending", PACKED)
def test_memory_stays_flat_however_well_it_is_packed(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(PACKED[ending](b"the same again " * (2 << 20)))
    tracemalloc.start()
    try:
        with opened(str(path), path.name, path.stat().st_size, None) as file:
            size = sum(map(len, iter(lambda: file.read(1 << 19), b"")))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == 15 * (2 << 20)
    assert peak < 16 << 20  # xz has a dictionary of 8 MiB


@pytest.mark.parametrize("head", [b"", b"\x1f", b"BZh9 is text", b"plain", b"P*M\x18"[:3]])
def test_text_is_not_taken_for_packed(head: bytes) -> None:
    assert packing_of(head) == ""


@pytest.mark.parametrize("ending", PACKED)
def test_empty_file_of_a_packed_name_is_damaged(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.txt{ending}").touch()
    with pytest.raises(DataError, match=rf"a\.txt\{ending} is empty, and no whole"):
        find([str(tmp_path / f"a.txt{ending}")])


# --- over HTTP


@contextlib.contextmanager
def server(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            answer(self)

        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def send(handler: http.server.BaseHTTPRequestHandler, announced: int, data: bytes, **headers: str) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(announced))
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(data)


@pytest.mark.parametrize("errors", ["strict", "skip"])
@pytest.mark.parametrize("shortened", ["body", "get"])
def test_short_transfer_is_an_error_that_may_be_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shortened: str, errors: str
) -> None:
    """Fewer bytes than announced: in one answer, or between the one to HEAD and that to GET."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        half = TEXT[: len(TEXT) // 2]
        announced = len(TEXT) if shortened == "body" or handler.command == "HEAD" else len(half)
        send(handler, announced, half)

    with server(answer) as address:
        code = room.main([f"{address}/a.txt?x=1", "--errors", errors, "--output-dir", str(tmp_path)])
    [*_, line] = capsys.readouterr().err.splitlines()
    assert code == 1
    assert re.match(rf"error: {address}/a\.txt\?x=1 (ends|cannot be read) after [\d,]+", line)
    assert not (tmp_path / "meta.json").exists()


def test_large_file_of_a_server_that_sends_no_parts_is_read() -> None:
    data = TEXT * 40
    with server(lambda handler: send(handler, len(data), data)) as address:
        url = f"{address}/a.txt"
        with opened(url, url, len(data), None) as file:
            assert file.read() == data
        with (
            pytest.raises(TransferError, match=r"ends after|cannot be read after"),
            opened(url, url, len(data) + 1, "") as file,
        ):
            file.read()
    assert len(data) > 5 << 20


def test_format_of_a_web_address_is_its_paths() -> None:
    with server(
        lambda handler: send(handler, 60, b'{"text": "one that is here"}\n{"text": "two that is here"}\n\n\n')
    ) as address:
        [source] = find([f"{address}/a.JSONL?download=true"])
    assert source.kind == "jsonl"


def test_store_that_breaks_off_names_the_place() -> None:
    class Broken(io.BytesIO):
        def readinto(self, _buffer: object) -> int:
            raise ConnectionResetError("reset by peer")

    file = streams._Counted(Broken(TEXT), "http://h/a.txt", len(TEXT), lambda _: None)
    with pytest.raises(TransferError, match=r"http://h/a\.txt cannot be read after 0 bytes \(reset by peer\)"):
        file.read(10)
    file = streams._Counted(io.BytesIO(TEXT[:100]), "s3://b/a.txt", len(TEXT), lambda _: None)
    with pytest.raises(TransferError, match=rf"s3://b/a\.txt ends after 100 of its {len(TEXT):,} bytes"):
        io.BufferedReader(file).read()


@pytest.mark.parametrize("command", ["zstd", "bzip2", "xz", "gzip"])
def test_what_the_commands_pack_is_read(tmp_path: Path, command: str) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    try:
        subprocess.run([command, "-q", "-k", str(tmp_path / "a.txt")], check=True)
    except FileNotFoundError:
        pytest.skip(f"needs {command}")
    [packed] = set(tmp_path.iterdir()) - {tmp_path / "a.txt"}
    assert read(packed) == TEXT


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.gz", b"\x1f"), ("a.bz2", b"B"), ("a.bz2", b"BZh9"), ("a.xz", b"\xfd7zXZ"), ("a.zst", b"\x28\xb5\x2f")],
)
def test_a_packed_file_that_was_cut_in_its_first_bytes_is_not_taken_for_text(
    name: str, data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(data)
    assert room.main([str(tmp_path / name), "--errors", "skip", "--tokenizer", "byte"]) == 2
    told = f"ends after {len(data)} bytes, and no whole {name[1:]} file is so short: get it again"
    assert told in capsys.readouterr().err


def test_zstd_with_a_dictionary_is_named_with_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"line {i} of a text with some words in it\n".encode() for i in range(3000)]
    dictionary = zstd.train_dict(lines, 2000)
    (tmp_path / "a.zst").write_bytes(zstd.compress(b"".join(lines), zstd_dict=dictionary))
    assert room.main([str(tmp_path / "a.zst")]) == 2
    assert "it was packed with a dictionary: zstd -dc -D DICTIONARY unpacks it" in capsys.readouterr().err
