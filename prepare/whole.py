"""Checks whether the files that data was prepared from are whole, with other readers than those that prepared it.

streams.py unpacks with its own loop. Here the file objects of the libraries do, and the end of each
file is checked as its format defines it. If one of the two overlooks something (a second member, a
stream that was cut), the other one shows it.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

from backports import zstd

from prepare.marks import Marks, without_marks
from prepare.sources import Source
from prepare.streams import store_of
from prepare.tokens import Input
from prepare.verify import Finding

_BZIP2_END = 0x177245385090
"""The 48 bits at the end of a bzip2 stream, at any bit offset; 32 bits of CRC and up to 7 bits of padding follow."""


class Broken(Exception):
    """A file is not whole. The message says why."""


def inputs_whole(sources: Sequence[Source], inputs: Sequence[Input], *, same_text: bool) -> Iterator[Finding]:
    """Reads the sources again, in another way. Yields a finding for each one that is not whole, and one for all.

    Args:
        sources: the files as they are now.
        inputs: what was read of them when the data was prepared.
        same_text: whether the text of a plain file went into the data unchanged (no separator was left out).
    """
    compared = 0
    recorded = {source.name: source for source in inputs}
    for source in sources:
        try:
            with _raw(source) as file:
                _check_end(source, file)
            with _raw(source) as file:
                digest, size = _digest(source, file)
        except (Broken, EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError) as error:
            yield Finding(False, f"{source.name} is not whole ({error}): get it again, and prepare the data again")
            continue
        seen = recorded.get(source.name)
        if same_text and source.kind == "text" and seen and not seen.repaired:
            if (digest, size) != (seen.sha256, seen.bytes):
                yield Finding(
                    False,
                    f"{source.name} has {size:,} bytes of text, of which {seen.bytes:,} were read: prepare the data again",
                )
                continue
            compared += 1
    yield Finding(True, f"{len(sources):,} inputs were looked at once more: {compared:,} are the text that was read")


def _raw(source: Source) -> IO[bytes]:
    if "://" in source.place:
        store, path = store_of(source.place)
        return io.BytesIO(store.cat_file(path)) if source.size < 1 << 26 else store.open(path, "rb")
    return open(source.place, "rb")  # noqa: PTH123 - closed by whoever asked


def _digest(source: Source, file: IO[bytes]) -> tuple[str, int]:
    """sha256 and number of the unpacked bytes, without byte order marks."""
    readers: dict[str, Any] = {
        "gzip": lambda: gzip.GzipFile(fileobj=file),
        "bzip2": lambda: bz2.BZ2File(file),
        "xz": lambda: lzma.LZMAFile(file),  # noqa: SIM115
        "zstd": lambda: zstd.ZstdFile(file, options={zstd.DecompressionParameter.window_log_max: 31}),
    }
    unpacked = readers[source.packing]() if source.packing else file
    digest, size = hashlib.sha256(), 0
    unpacked.read(source.mark)
    blocks = ((0, 0, number == 0, block) for number, block in enumerate(iter(lambda: unpacked.read(1 << 20), b"")))
    for *_, block in without_marks(blocks, Marks()):
        digest.update(block)
        size += len(block)
    return digest.hexdigest(), size


def _check_end(source: Source, file: IO[bytes]) -> None:
    """Raises Broken if a file does not end as its format says."""
    size = file.seek(0, io.SEEK_END)
    if source.size and size != source.size:
        raise Broken(f"it has {size:,} bytes, and should have {source.size:,}")
    if source.packing == "zstd":
        file.seek(0)
        _walk_zstd(file, size)
        return
    file.seek(max(0, size - 1024))
    tail = file.read(1024)
    if source.packing == "xz":
        footer = tail.rstrip(b"\0")[-12:]
        if footer[-2:] != b"YZ" or zlib.crc32(footer[4:10]) != int.from_bytes(footer[:4], "little"):
            raise Broken("it does not end with a footer of xz")
    elif source.packing == "bzip2":
        bits = int.from_bytes(tail[-11:], "big")
        if not any(bits >> (32 + padding) & (1 << 48) - 1 == _BZIP2_END for padding in range(8)):
            raise Broken("it does not end with the mark of bzip2")
    elif source.kind == "parquet" and (tail[-4:] != b"PAR1" or int.from_bytes(tail[-8:-4], "little") > size - 12):
        raise Broken("it does not end with a footer of Parquet")
    elif source.kind == "json" and not source.packing and not tail.rstrip().endswith(b"]"):
        raise Broken("its array has no end")


def _walk_zstd(file: IO[bytes], size: int) -> None:
    """Goes from frame to frame and block to block by their lengths (RFC 8878, section 3). Raises Broken."""

    def take(count: int) -> bytes:
        data = file.read(count)
        if len(data) < count:
            raise Broken(f"its last frame goes on behind byte {size:,}, where it ends")
        return data

    def skip(count: int) -> None:
        if file.tell() + count > size:
            raise Broken(f"its last frame goes on behind byte {size:,}, where it ends")
        file.seek(count, io.SEEK_CUR)

    while file.tell() < size:
        magic = int.from_bytes(take(4), "little")
        if 0x184D2A50 <= magic <= 0x184D2A5F:
            skip(int.from_bytes(take(4), "little"))
            continue
        if magic != 0xFD2FB528:
            raise Broken(f"at byte {file.tell() - 4:,} there is no frame of zstd")
        descriptor = take(1)[0]
        single = descriptor >> 5 & 1
        dictionary = (0, 1, 2, 4)[descriptor & 3]
        content = (single, 2, 4, 8)[descriptor >> 6]
        skip((not single) + dictionary + content)
        last = False
        while not last:
            header = int.from_bytes(take(3), "little")
            last = bool(header & 1)
            skip(1 if header >> 1 & 3 == 1 else header >> 3)  # a block of one repeated byte has one byte
        skip(4 * (descriptor >> 2 & 1))
