"""Byte order marks within a text: files that each begin with one were joined.

A mark (U+FEFF) at the beginning of a line is left out: it says how a file is encoded and is not
part of the text. In the middle of a line the same character is an old "zero width no-break space",
so it stays. Both are counted.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

BOM = b"\xef\xbb\xbf"
"""The byte order mark in UTF-8."""
_AT_LINE_START = re.compile(rb"(?<![^\r\n])(?:\xef\xbb\xbf)+")

Row = tuple[int, int, bool, bytes]
"""Some text: number of its record, byte at which it begins, whether a document begins with it, and its bytes."""


@dataclass
class Marks:
    """How many marks there were within a source, its very first bytes not counted."""

    dropped: int = 0
    kept: int = 0
    first: tuple[int, int] = (0, 0)
    """Record number and offset of the first one, dropped or kept."""

    def __bool__(self) -> bool:
        return self.dropped + self.kept > 0

    def count(self, row: int, offset: int, *, dropped: int = 0, kept: int = 0) -> None:
        if not self:
            self.first = row, offset
        self.dropped += dropped
        self.kept += kept


def without_marks(rows: Iterator[Row], marks: Marks) -> Iterator[Row]:
    """The same text without the marks at the beginning of lines, wherever `rows` cut it; `marks` counts them.

    A document that consists of marks alone gives no row.
    """
    before = b""  # the last byte that was given of this document, to see whether a line begins
    held = b""  # what may be the beginning of a mark
    row = at = 0
    begins = False
    for number, offset, new, data in rows:
        if new:
            if held:
                yield row, at, begins, held
            before, held, begins = b"", b"", True
        text = before + held + data
        row, origin = number, offset - len(held) - len(before)
        start, end = len(before), len(text) - next(n for n in (2, 1, 0) if text.endswith(BOM[:n]))
        for mark in _AT_LINE_START.finditer(text, 0, end) if BOM in text else ():
            marks.count(row, origin + mark.start(), dropped=len(mark[0]) // len(BOM))
            if start < mark.start():
                yield row, origin + start, begins, _counted(text[start : mark.start()], row, origin + start, marks)
                begins = False
            start, before = mark.end(), b""
        if start < end:
            yield row, origin + start, begins, _counted(text[start:end], row, origin + start, marks)
            begins, before = False, text[end - 1 : end]
        held, at = text[end:], origin + end
    if held:
        yield row, at, begins, held


def _counted(text: bytes, row: int, offset: int, marks: Marks) -> bytes:
    if kept := text.count(BOM):
        marks.count(row, offset + text.index(BOM), kept=kept)
    return text
