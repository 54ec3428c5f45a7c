"""The text of the sources, read document by document, in any of the formats that formats.py knows.

Text passes through as bytes of UTF-8 in pieces of about 0.5 MiB. Their borders mean nothing: they
may cut a character. No more than one piece of plain text is in memory at a time; a record
(records.py) is held whole.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import numpy as np

from prepare import records
from prepare.marks import Row, without_marks
from prepare.records import Tally, Texts
from prepare.sources import Source, sample_texts, state
from prepare.streams import Advance, opened, read_up_to
from prepare.tokens import DataError, Input

PIECE_BYTES = 1 << 19


class Piece(NamedTuple):
    """Some text of one document."""

    source: int
    """Index of the source that it comes from."""
    row: int
    """The number of its record (line, element or row), from 1 on; 0 in plain text."""
    offset: int
    """The byte at which it begins, counted in the record's text, or in the unpacked file for plain text."""
    begins: bool
    """Whether a document begins with it; if not, it continues the piece before."""
    data: bytes


@dataclass(frozen=True)
class Layout:
    """How documents lie in the files."""

    separator: bytes = b""
    """What stands between the documents of a text file. Empty: each file is one document."""
    field: str = "text"
    """The field of a record whose text is read."""
    lenient: bool = False
    """Whether broken records are left out and counted. If not, the first one is an error."""


@dataclass
class _Seen:
    """What was read of one source so far."""

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
        self.tallies = [Tally(source.name, layout.field, layout.lenient) for source in sources]
        """For each source, the records that were left out."""
        self.undivided: list[int] = []
        """Indices of the plain text sources in which the separator does not occur."""

    def pieces(self) -> Iterator[Piece]:
        """All pieces of all sources. Raises DataError if a source cannot be read in its format, or has changed."""
        for number, source in enumerate(self._sources):
            empty = True
            for row, offset, begins, data in self._read(number, source):
                self.documents += begins
                empty = empty and not data
                yield Piece(number, row, offset, begins, data)
            if empty and len(self._sources) == 1:
                raise DataError(f"{source.name} is empty: there is nothing to learn from")

    def measured_pieces(self) -> Iterator[Piece]:
        """The same pieces. When the last one has come, `inputs` describes what was read."""
        self._seen = [_Seen() for _ in self._sources]
        for piece in self.pieces():
            seen = self._seen[piece.source]
            seen.documents += piece.begins
            seen.characters += count_characters(piece.data)
            seen.bytes += len(piece.data)
            seen.digest.update(piece.data)
            yield piece

    def inputs(self, repaired: Sequence[int]) -> list[Input]:
        """What `measured_pieces` read. `repaired`: for each source, how many places were not valid UTF-8."""
        counts = zip(self._sources, self._seen, repaired, self.tallies, strict=True)
        return [
            Input(
                source.name, seen.documents, seen.characters, seen.bytes, seen.digest.hexdigest(), places + tally.broken
            )
            for source, seen, places, tally in counts
        ]

    def _read(self, number: int, source: Source) -> Iterator[Row]:
        if not source.place:
            yield from ((0, 0, True, text.encode()) for text in sample_texts())
            return
        if (now := state(source)) != (source.size, source.state):
            raise DataError(f"{source.name} changed since this run began: try again when nobody writes to it")
        with opened(source.place, source.name, source.size, source.packing, self._advance) as file:
            start = len(read_up_to(file, source.mark))
            if source.kind != "text":
                tally = self.tallies[number]
                yield from ((row, 0, True, text) for row, text in _records(source.kind, file, tally))
                tally.finish()
            elif self._layout.separator:
                read = text = 0

                def blocks() -> Iterator[bytes]:
                    nonlocal read
                    for block in _blocks(file):
                        read += len(block)
                        yield block

                def rows() -> Iterator[Row]:
                    nonlocal text
                    for row in _separated(blocks(), self._layout.separator, start):
                        text += len(row[3])
                        yield row

                yield from without_marks(rows(), self.tallies[number].marks)
                if text == read > 0:
                    self.undivided.append(number)
            else:
                yield from without_marks(_undivided(file, start), self.tallies[number].marks)
        if state(source) != now:
            raise DataError(f"{source.name} changed while it was being read: try again when nobody writes to it")


def _records(kind: str, file: IO[bytes], tally: Tally) -> Texts:
    if kind == "jsonl":
        return records.json_lines(file, tally)
    if kind == "json":
        return records.json_array(file, tally)
    if kind == "parquet":
        return records.parquet(file, tally)
    return records.csv_rows(file, tally, delimiter="," if kind == "csv" else "\t")


def count_characters(data: bytes) -> int:
    """Number of UTF-8 characters that begin in `data`."""
    return int(np.count_nonzero(np.frombuffer(data, dtype=np.int8) >= -64))


def offset_of_character(data: bytes, number: int) -> int:
    """The byte of `data` at which its character `number` begins, counted from 0."""
    return int(np.flatnonzero(np.frombuffer(data, dtype=np.int8) >= -64)[number])


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    """All of a file in blocks of PIECE_BYTES; only the last one may be shorter, even if single reads give less."""
    while block := read_up_to(file, PIECE_BYTES):
        yield block


def _undivided(file: IO[bytes], offset: int) -> Iterator[Row]:
    """All of a file as one document. `offset`: of its first byte."""
    begins = True
    for block in _blocks(file):
        yield 0, offset, begins, block
        offset, begins = offset + len(block), False


def _separated(blocks: Iterator[bytes], separator: bytes, start: int = 0) -> Iterator[Row]:
    """The text between the separators. Empty documents are left out. `start`: offset of the first byte."""
    held, at, begins = b"", start, True
    for block in blocks:
        *documents, held = (held + block).split(separator)
        for document in documents:
            if document:
                yield 0, at, begins, document
            at += len(document) + len(separator)
            begins = True
        # The end of a block may be the beginning of a separator: it waits for the next block.
        sure = max(0, len(held) - len(separator) + 1)
        if sure:
            yield 0, at, begins, held[:sure]
            held, at, begins = held[sure:], at + sure, False
    if held:
        yield 0, at, begins, held
