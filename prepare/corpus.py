"""The text of the sources, read document by document: plain, JSON lines or Parquet; packed with gzip or zstd or not.

Text passes through as bytes of UTF-8 in pieces of about 0.5 MiB, whose borders mean nothing (they may cut a character). Of
plain text no more than a piece is held; a line of JSON and a row of Parquet are held whole.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import numpy as np

from prepare.sources import Source, sample_texts, state, store_of, unreachable
from prepare.tokens import DataError, Input

PIECE_BYTES = 1 << 19

Advance = Callable[[int], None]
Row = tuple[int, int, bool, bytes]
"""A Piece without its source."""


class Piece(NamedTuple):
    """Some text of one document."""

    source: int
    """Which of the sources."""
    row: int
    """The number of its line of JSON or row of Parquet, from 1 on; 0 in plain text."""
    offset: int
    """Where it begins: the byte of that row's text, or of the (unpacked) file."""
    begins: bool
    """Whether a document begins here; else it goes on."""
    data: bytes


@dataclass(frozen=True)
class Layout:
    """How documents lie in the files."""

    separator: bytes = b""
    """Between the documents of a text file; empty: the file is one."""
    field: str = "text"
    """Of a JSON line, or the column of a Parquet file."""
    lenient: bool = False
    """Whether broken lines of JSON are left out and counted, instead of stopping."""


@dataclass
class _Seen:
    """What was read of a source."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    digest: Any = field(default_factory=hashlib.sha256)


class Reading:
    """Reads sources once, from the first to the last."""

    def __init__(self, sources: Sequence[Source], layout: Layout, advance: Advance) -> None:
        self.documents = 0
        self._sources = sources
        self._layout = layout
        self._advance = advance
        self._seen: list[_Seen] = []
        self.left_out = [0] * len(sources)
        """Lines of JSON left out because they are broken, per source."""

    def pieces(self) -> Iterator[Piece]:
        """All text there is. Raises DataError where a source cannot be read as what it should be, or changed."""
        for number, source in enumerate(self._sources):
            empty = True
            for row, offset, begins, data in self._read(number, source):
                self.documents += begins
                empty = empty and not data
                yield Piece(number, row, offset, begins, data)
            if empty and len(self._sources) == 1:
                raise DataError(f"{source.name} is empty: there is nothing to learn from")

    def measured_pieces(self) -> Iterator[Piece]:
        """The same; at their end, `inputs` knows what they were."""
        self._seen = [_Seen() for _ in self._sources]
        for piece in self.pieces():
            seen = self._seen[piece.source]
            seen.documents += piece.begins
            seen.characters += count_characters(piece.data)
            seen.bytes += len(piece.data)
            seen.digest.update(piece.data)
            yield piece

    def inputs(self, repaired: Sequence[int]) -> list[Input]:
        """What measured_pieces read; `repaired` of each source is the number of places that were no UTF-8."""
        counts = zip(self._sources, self._seen, repaired, self.left_out, strict=True)
        return [
            Input(source.name, seen.documents, seen.characters, seen.bytes, seen.digest.hexdigest(), places + lines)
            for source, seen, places, lines in counts
        ]

    def _read(self, number: int, source: Source) -> Iterator[Row]:
        if not source.place:
            yield from ((0, 0, True, text.encode()) for text in sample_texts())
            return
        if (now := state(source)) != (source.size, source.state):
            raise DataError(f"{source.name} changed since this run began: try again when nobody writes to it")
        try:
            with _opened(source, self._advance) as file:
                if source.kind == "table":
                    yield from _table(source, file, self._layout.field)
                elif source.kind == "rows":
                    yield from self._rows(number, source, file)
                elif self._layout.separator:
                    yield from _separated(_blocks(file), self._layout.separator)
                else:
                    offset = 0
                    for block in _blocks(file):
                        yield 0, offset, not offset, block
                        offset += len(block)
        except (EOFError, gzip.BadGzipFile, zlib.error) as err:
            raise DataError(f"{source.name} cannot be unpacked ({err}): it is damaged, or no gzip file") from err
        except Exception as err:
            if "://" not in source.place or isinstance(err, DataError | MemoryError):
                raise
            raise unreachable(source.name, err) from err
        if state(source) != now:
            raise DataError(f"{source.name} changed while it was being read: try again when nobody writes to it")

    def _rows(self, number: int, source: Source, file: IO[bytes]) -> Iterator[Row]:
        field = self._layout.field
        for at, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                data = _utf8(json.loads(line.decode("utf-8", "surrogateescape"))[field])
            except KeyError as err:
                has = ", ".join(json.loads(line)) or "nothing"
                raise DataError(
                    f"line {at:,} of {source.name} has no field {field!r}, it has {has}: choose with --text-field"
                ) from err
            except (ValueError, TypeError, AttributeError) as err:
                if not self._layout.lenient:
                    raise DataError(
                        f"line {at:,} of {source.name} is no JSON object with text in {field!r} ({err}): "
                        "mend it, or leave such lines out with --errors skip"
                    ) from err
                self.left_out[number] += 1
                continue
            if data:
                yield at, 0, True, data


def count_characters(data: bytes) -> int:
    """Characters that begin in `data`: its bytes but those that continue one."""
    return int(np.count_nonzero(np.frombuffer(data, dtype=np.int8) >= -64))


def offset_of_character(data: bytes, number: int) -> int:
    """Where in `data` the character with that number (from 0 on) begins."""
    return int(np.flatnonzero(np.frombuffer(data, dtype=np.int8) >= -64)[number])


class _Counted(io.RawIOBase):
    """A file that tells how much of it was read."""

    def __init__(self, file: IO[bytes], advance: Advance) -> None:
        self._file = file
        self._advance = advance

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        count: int = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self._advance(count)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _opened(source: Source, advance: Advance) -> IO[bytes]:
    if "://" in source.place:
        store, path = store_of(source.place)
        raw = store.open(path, "rb")
    else:
        raw = open(source.place, "rb", buffering=0)  # noqa: PTH123, SIM115 - closed by whoever asked
    file: Any = io.BufferedReader(_Counted(raw, advance), PIECE_BYTES)
    if source.place.endswith(".gz"):
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if source.place.endswith(".zst"):
        return _zstd(file, source.name)
    return file


def _zstd(file: IO[bytes], name: str) -> IO[bytes]:
    try:
        import zstandard
    except ImportError as err:
        raise DataError(f"{name} needs zstandard to be unpacked: pip install zstandard") from err

    class Unpacked(io.RawIOBase):
        def __init__(self) -> None:
            self._stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            self._any = False

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            try:
                count = self._stream.readinto(buffer)
            except zstandard.ZstdError as err:
                raise DataError(f"{name} cannot be unpacked ({err}): it is damaged, or no zstd file") from err
            return count

        def close(self) -> None:
            self._stream.close()
            file.close()
            super().close()

    return io.BufferedReader(Unpacked(), PIECE_BYTES)


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    """All of a file in blocks of PIECE_BYTES, the last one shorter, however few a read gives."""
    while True:
        block = file.read(PIECE_BYTES)
        while block and len(block) < PIECE_BYTES and (more := file.read(PIECE_BYTES - len(block))):
            block += more
        if not block:
            return
        yield block


def _separated(blocks: Iterator[bytes], separator: bytes) -> Iterator[Row]:
    """The text between separators (found from the left). Documents without text are left out."""
    held, at, begins = b"", 0, True
    for block in blocks:
        *documents, held = (held + block).split(separator)
        for document in documents:
            if document:
                yield 0, at, begins, document
            at += len(document) + len(separator)
            begins = True
        # What might be the beginning of a separator waits for the next block.
        sure = max(0, len(held) - len(separator) + 1)
        if sure:
            yield 0, at, begins, held[:sure]
            held, at, begins = held[sure:], at + sure, False
    if held:
        yield 0, at, begins, held


def _utf8(text: str) -> bytes:
    """Its bytes. What is no UTF-8 (a bad byte, half a character like "\\ud800") stays so, and is dealt with later."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        try:
            return text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return text.encode("utf-8", "surrogatepass")


def _table(source: Source, file: IO[bytes], column: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as err:
        raise DataError(f"{source.name} needs pyarrow to be read: pip install 'elastic-gpt[parquet]'") from err
    try:
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
        if column not in table.schema_arrow.names:
            has = ", ".join(table.schema_arrow.names)
            raise DataError(f"{source.name} has no column {column!r}, it has {has}: choose with --text-field")
        at = 0
        for batch in table.iter_batches(batch_size=512, columns=[column]):
            for text in batch.column(0).to_pylist():
                at += 1
                if text:
                    if not isinstance(text, str | bytes):
                        raise DataError(f"column {column!r} of {source.name} holds no text: choose with --text-field")
                    yield at, 0, True, text.encode() if isinstance(text, str) else text
    except pyarrow.ArrowException as err:
        raise DataError(f"{source.name} cannot be read as Parquet: {str(err).splitlines()[0]}") from err
