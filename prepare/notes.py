"""Messages about text that cannot be used as it is: where it is, what it seems to be, and what helps."""

import codecs
from collections import Counter
from collections.abc import Sequence

from prepare import streams
from prepare.corpus import Reading
from prepare.encodings import narrow_encoding
from prepare.formats import suffixes
from prepare.frontdoor import printable
from prepare.not_text import About
from prepare.sources import Say, Source
from prepare.tokens import DataError


def bad_text(source: Source, row: int, offset: int, byte: int) -> DataError:
    """The error for a `byte` that is not UTF-8. It lies `offset` bytes into record `row`, or into the file if `row` is 0."""
    bad = f"{source.name} is not UTF-8 text: {source.where(row, offset)} has 0x{byte:02x}"
    if row and byte == 0xED:
        return DataError(f"{bad}, half a character such as \\ud800: mend it, or say --errors replace or skip")
    if source.kind == "parquet":  # iconv cannot convert what is inside Parquet
        return DataError(f"{bad}: write the column as strings, or say --errors replace or skip")
    _, head = streams.head(source.place, source.name, source.size) if source.place else ("", b"")
    # If the file begins with ASCII, guess the encoding by what follows the bad byte.
    sample = head if max(head, default=0) > 0x7F else _from(source, offset) or bytes([byte])
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return DataError(
            f"{bad}, where UTF-16 text seems to begin: files were joined; convert that one, or say --errors replace or skip"
        )
    cure = _recoding(source.name, source.place, source.packing, sample)
    return DataError(f"{bad}; {cure}")


def _from(source: Source, offset: int) -> bytes:
    """Up to 4,096 bytes of a local plain text file from `offset` on; b"" for others, which would be slow to reach."""
    if source.kind != "text" or source.packing or not source.place or "://" in source.place:
        return b""
    with open(source.place, "rb") as file:  # noqa: PTH123
        file.seek(offset)
        return file.read(4096)


def _recoding(name: str, place: str, packing: str, data: bytes) -> str:
    """What to do about text that is not UTF-8. `data`: its beginning, or the part that is not UTF-8."""
    otherwise = "--errors replace or skip"
    encoding = narrow_encoding(data)
    if not encoding:
        return f"the rest seems to be, so it is damaged or mixed: get it again, or say {otherwise}"
    if encoding == "CESU-8":
        code = "import sys; i, o = sys.stdin.buffer, sys.stdout.buffer; t = i.read().decode('utf-8', 'surrogatepass')"
        join = f"python3 -c \"{code}; o.write(t.encode('utf-16', 'surrogatepass').decode('utf-16').encode())\""
        line = About(name, place, packing).filter(join, f".utf8{suffixes(place)[0] or '.txt'}")
        return f"it seems to be CESU-8, with a character as two halves; say {otherwise}, or convert it: {line}"
    seems = {"WINDOWS-1252": "Latin-1 (or Windows-1252)", "ISO-8859-1": "Latin-1"}.get(encoding, encoding)
    line = About(name, place, packing).filter(f"iconv -f {encoding} -t utf-8", f".utf8{suffixes(place)[0] or '.txt'}")
    return f"it seems to be {seems}; say {otherwise}, or convert it: {line}"


def left_out(reading: Reading, sources: Sequence[Source], separator: str, say: Say) -> None:
    """Say which records gave no text, which byte order marks were found, and what the separator did not divide."""
    if broken := [tally for tally in reading.tallies if tally.broken]:
        number = sum(tally.broken for tally in broken)
        say(f"{number:,} broken records left out (first: {broken[0].name}:{broken[0].first_broken})")
    if without := [tally for tally in reading.tallies if tally.without]:
        reasons: Counter[str] = Counter()
        for tally in without:
            reasons.update(tally.without)
        why = ", ".join(f"{number:,} {reason}" for reason, number in sorted(reasons.items()))
        say(
            f"{sum(reasons.values()):,} records without text in {without[0].wanted!r} left out: {why} "
            f"(first: {without[0].name}:{without[0].first})"
        )
    marked = [(source, tally.marks) for source, tally in zip(sources, reading.tallies, strict=True) if tally.marks]
    if marked:
        dropped, kept = (sum(getattr(marks, what) for _, marks in marked) for what in ("dropped", "kept"))
        source, marks = marked[0]
        told = [f"{dropped:,} at the beginning of lines left out"] * (dropped > 0)
        told += [f"{kept:,} within lines kept as characters of the text"] * (kept > 0)
        say(f"byte order marks (U+FEFF): {', '.join(told)} (first: {source.where(*marks.first)} of {source.name})")
    if reading.undivided:
        source = sources[reading.undivided[0]]
        number = len(reading.undivided)
        say(
            f"--separator '{printable(separator)}' does not occur in {number:,} file{'s' * (number > 1)}, "
            f"each of which is one document (first: {source.name}, {_line_ends(source)})"
        )


def _line_ends(source: Source) -> str:
    """A phrase that says how the lines of a text end."""
    _, head = streams.head(source.place, source.name, source.size)
    crlf, lf, cr = head.count(b"\r\n"), head.count(b"\n"), head.count(b"\r")
    if crlf and crlf * 2 > lf:
        return r"whose lines end with CRLF, \r\n: try '\r\n\r\n' or the like"
    if cr > lf:
        return r"whose lines end with CR, \r: try '\r\r' or the like"
    return r"whose lines end with \n" if lf else "which has one line"
