"""Formats whose documents are records: JSON lines, a JSON array, CSV and TSV, Parquet. One field of each record is read.

Each reader yields (row, text): the number of the line, element or row, from 1 on, and the UTF-8 of
its text. Records without text (the field is missing, null, empty or not a string) are left out and
counted in a Tally, and so are broken records if that is allowed.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from prepare.formats import JSON
from prepare.frontdoor import install
from prepare.marks import BOM, Marks, without_marks
from prepare.streams import TransferError
from prepare.tokens import DataError

Texts = Iterator[tuple[int, bytes]]

MAX_RECORD = 256 << 20
"""Most characters of a JSON element, or bytes of a CSV field."""
BLOCK = 1 << 19
"""Characters of a JSON array that are read at a time."""
_MISSING = object()


@dataclass
class Tally:
    """Counts the records of one source that were left out, and why."""

    name: str
    """What the user called the source."""
    wanted: str
    """The field whose text is read. `a.b` is field b within field a, unless a field is called "a.b"."""
    lenient: bool = False
    """Whether broken records are left out. If not, the first one is an error."""
    unit: str = "line"
    record: str = "JSON object"
    texts: int = 0
    broken: int = 0
    first_broken: int = 0
    without: dict[str, int] = field(default_factory=dict)
    """Reason why a record had no text, to the number of such records."""
    first: int = 0
    """The first record without text."""
    has: list[str] = field(default_factory=list)
    """Fields of the first record that lacks the one wanted."""
    marks: Marks = field(default_factory=Marks)

    def take(self, row: int, value: object) -> Texts:
        """Yields the text of a record, if `value` is one, and counts it."""
        if isinstance(value, str | bytes):
            data = value if isinstance(value, bytes) else utf8(value)
            if BOM in data:
                whole = iter([(row, 0, True, data)])
                value = data = b"".join(text for *_, text in without_marks(whole, self.marks))
            if data:
                self.texts += 1
                yield row, data
                return
        if value is _MISSING:
            reason = "missing"
        elif value is None:
            reason = "null"
        else:
            reason = "not a string" if not isinstance(value, str | bytes) else "empty"
        self.first = self.first or row
        self.without[reason] = self.without.get(reason, 0) + 1

    def lookup(self, record: dict[str, Any]) -> object:
        """The value of the wanted field in `record`, or _MISSING."""
        if self.wanted in record:
            return record[self.wanted]
        value: object = record
        for name in self.wanted.split("."):
            if not isinstance(value, dict) or name not in value:
                self.has = self.has or list(record)
                return _MISSING
            value = value[name]
        return value

    def broke(self, row: int, reason: object, cure: str = "mend it") -> None:
        """Counts a record that cannot be read. Raises DataError unless these are left out."""
        if not self.lenient:
            raise DataError(
                f"{self.unit} {row:,} of {self.name} is not a {self.record} ({reason}): {cure}, or leave such "
                f"{self.unit}s out with --errors skip"
            )
        self.broken += 1
        self.first_broken = self.first_broken or row

    def finish(self) -> None:
        """Raises DataError if there were records, but none of them had text."""
        if self.texts or not self.without or set(self.without) == {"empty"}:
            return
        if set(self.without) <= {"missing", "empty"}:
            has = ", ".join(map(str, self.has)) or "nothing"
            raise DataError(
                f"{self.unit} {self.first:,} of {self.name} has no field {self.wanted!r}, it has {has}: choose with "
                f"--text-field (no other {self.unit} has it either), or say --format text"
            )
        raise DataError(
            f"{self.unit} {self.first:,} of {self.name} is not a {self.record} with text in {self.wanted!r} "
            f"({self.reasons()}), and no other is: choose with --text-field"
        )

    def reasons(self) -> str:
        """A phrase that says why records had no text."""
        return ", ".join(f"{number:,} {reason}" for reason, number in sorted(self.without.items()))


def json_lines(file: IO[bytes], tally: Tally) -> Texts:
    for at, line in enumerate(file, 1):
        if line.startswith(BOM):  # files that each begin with a mark were joined
            tally.marks.count(at, 0, dropped=1)
        line = line.removeprefix(BOM).strip()
        if not line:
            continue
        try:
            record = JSON.decode(line.decode("utf-8", "surrogateescape"))
        except ValueError as error:
            tally.broke(at, error)
            continue
        except RecursionError:
            tally.broke(at, "it is nested too deeply")
            continue
        if not isinstance(record, dict):
            tally.broke(at, f"it is {_shown(record)}")
            continue
        yield from tally.take(at, tally.lookup(record))


def json_array(file: IO[bytes], tally: Tally) -> Texts:
    """The elements of a JSON array. No more than one element and a block are in memory at a time."""
    tally.unit = "element"
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    held = text.read(BLOCK).lstrip().removeprefix("[")
    at, begin = 1, 0
    comma = False  # whether a comma must come before the next element
    while True:
        while begin < len(held) and held[begin] in " \t\r\n":
            begin += 1
        if begin == len(held):
            held, begin = text.read(BLOCK), 0
            if not held:
                raise DataError(f"{tally.name} ends before its array does, after {at - 1:,} elements: get it again")
            continue
        if held[begin] == "]":
            break
        if comma:
            if held[begin] != ",":
                raise DataError(f"{tally.name} has no comma after element {at - 1:,} of its array: mend it")
            begin, comma = begin + 1, False
            continue
        if held[begin] != "{":
            raise DataError(f"element {at:,} of {tally.name} is not a JSON object: make it one, or leave it out")
        try:
            record, end = JSON.raw_decode(held, begin)
        except json.JSONDecodeError as error:
            cut = error.pos > len(held) - 16 or error.msg.startswith("Unterminated")
            size = len(held) - begin
            more = text.read(max(BLOCK, size)) if cut and size < MAX_RECORD else ""  # doubles: not quadratic
            if not more:
                end_of = "the file ends before the array does" if cut else "mend it"
                raise DataError(
                    f"element {at:,} of {tally.name} is not JSON ({error.msg}): {end_of}, or get it again"
                ) from error
            held, begin = held[begin:] + more, 0
            continue
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise DataError(f"element {at:,} of {tally.name} cannot be read ({reason}): mend it") from error
        begin, comma = end, True
        yield from tally.take(at, tally.lookup(record))
        at += 1
    rest = held[begin + 1 :]
    while rest:
        if rest.strip():
            raise DataError(f"{tally.name} goes on after the end of its array: take it apart, or say --format jsonl")
        rest = text.read(BLOCK)


def csv_rows(file: IO[bytes], tally: Tally, delimiter: str) -> Texts:
    """The rows below the header. Quoted fields may have line breaks."""
    tally.record = "CSV row"
    csv.field_size_limit(MAX_RECORD)
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    head = text.readline()
    if delimiter == ",":
        delimiter = max(",;\t|", key=lambda sign: (tally.wanted in head.strip().split(sign), head.count(sign)))
    lines = _Lines(head, text, tally.marks)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        names = next(rows, [])
    except csv.Error as error:
        raise DataError(f"the header of {tally.name} is not CSV ({error}): mend it, or say --format text") from error
    if tally.wanted not in names:
        raise DataError(
            f"{tally.name} has no column {tally.wanted!r}, it has {', '.join(names) or 'nothing'}: choose with --text-field "
            "(the first line names the columns)"
        )
    _once(tally, names)
    column = names.index(tally.wanted)
    while True:
        at = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise DataError(
                    f"the quoted field that begins in line {at:,} of {tally.name} has no end: mend it, or get the file again"
                ) from error
            tally.broke(at, error)
            continue
        if not row:
            continue
        if len(row) > len(names):
            tally.broke(at, f"it has {len(row)} cells, the header {len(names)}", "quote what holds a separator")
            continue
        yield from tally.take(at, row[column] if column < len(row) else _MISSING)


class _Lines:
    """The lines of a CSV file whose first line was read already, without byte order marks before a quoted first field."""

    def __init__(self, first: str, file: io.TextIOWrapper, marks: Marks) -> None:
        self._first, self._file, self._marks = first, file, marks

    def __iter__(self) -> Iterator[str]:
        if self._first:
            yield self._first
        for number, line in enumerate(self._file, 2):
            if line.startswith("\ufeff"):
                self._marks.count(number, 0, dropped=1)
            yield line.removeprefix("\ufeff")


def parquet(file: IO[bytes], tally: Tally) -> Texts:
    tally.unit = "row"
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{tally.name} needs pyarrow to be read: {install('parquet')}") from error
    try:
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
        names = table.schema_arrow.names
        top = tally.wanted if tally.wanted in names else tally.wanted.split(".")[0]
        if top not in names:
            raise DataError(
                f"{tally.name} has no column {tally.wanted!r}, it has {', '.join(names)}: choose with --text-field"
            )
        _once(tally, names, top)
        kind = table.schema_arrow.field(top).type
        at = 0
        for batch in table.iter_batches(batch_size=512, columns=[tally.wanted if top != tally.wanted else top]):
            if not batch.num_columns:
                raise DataError(
                    f"{tally.name} has no column {tally.wanted!r}, {top!r} is {kind}: choose with --text-field"
                )
            for value in batch.column(0).to_pylist():
                at += 1
                if top != tally.wanted:
                    value = tally.lookup({top: value} if value is not None else {top: {}})
                    value = None if value is _MISSING else value
                if value is not None and not isinstance(value, str | bytes):
                    raise DataError(
                        f"column {tally.wanted!r} of {tally.name} has {kind}, not text: choose with --text-field"
                    )
                yield from tally.take(at, value)
        if at != table.metadata.num_rows:
            raise DataError(f"{tally.name} has {at:,} rows and says {table.metadata.num_rows:,}: get it again")
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, TransferError) or getattr(error, "errno", None) is not None:  # not the file's fault
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{tally.name} cannot be read as Parquet ({reason}): it is damaged, or a transfer broke off; get it again"
        ) from error


def _once(tally: Tally, names: list[str], name: str = "") -> None:
    """Raises DataError if several columns have the wanted name, since the right one cannot be known."""
    name = name or tally.wanted
    if (number := names.count(name)) > 1:
        raise DataError(f"{tally.name} has {number} columns {name!r}: rename the one that is not meant")


def utf8(text: str) -> bytes:
    """The UTF-8 of `text`. A bad byte or half a character (\\ud800) stays invalid, and encoding deals with it later."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        try:
            return text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return text.encode("utf-8", "surrogatepass")


def _shown(value: object) -> str:
    return {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}.get(type(value), "a number")
