"""Finds out what a file is, by its first bytes and then its name: a format that can be read, or something to refuse.

A refusal names what the file seems to be and the command that helps. Whatever is not surely
something else is text: source code, logs, prose that begins with a bracket. To be taken for JSON it
has to parse as JSON.
"""

import json
import re
import shlex
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from prepare.marks import BOM
from prepare.not_text import About, NoText, refuse_binary
from prepare.streams import PACKINGS

NAMES = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
"""The format by the ending of the name. Of a folder, only the files with these endings are read."""
FORMATS = ("text", "jsonl", "json", "csv", "tsv", "parquet")

JSON = json.JSONDecoder(parse_int=float)  # as floats, since Python refuses integers of more than 4,300 digits


def suffixes(name: str) -> tuple[str, str]:
    """The two endings of a name, for its format and for its packing, in lower case. "" if it has none.

    In a web address, what follows ? or # does not belong to the name.
    """
    path = urlsplit(name).path if name.lower().startswith(("http://", "https://")) else name
    path = PurePosixPath(path).name.lower()
    packing = next((ending for ending in PACKINGS if path.endswith(ending)), "")
    return PurePosixPath(path.removesuffix(packing)).suffix, packing


def format_of(
    head: bytes, name: str, place: str, packing: str, *, whole: bool, field: str, wanted: str = "auto"
) -> str:
    """The format of a file, one of FORMATS. Raises NoText if it cannot be read as text.

    Args:
        head: its first bytes, unpacked.
        name: what the user called it.
        place: its path or URL.
        packing: how it is packed, one of the values of streams.PACKINGS; "" if it is not.
        whole: whether `head` is all of it.
        field: a file with another ending is CSV if it has a column of this name.
        wanted: what the user says it is: one of FORMATS, or "auto".
    """
    head_text = head.removeprefix(BOM)
    if wanted not in ("auto", "json"):
        return wanted
    about = About(name, place, packing)
    ending, packed = suffixes(place)
    if head.startswith(b"PAR1"):
        if packing:  # reading Parquet begins at its end, which packing hides
            raise about.refusal(f"Parquet, packed with {packing}", about.filter("cat", ".parquet"))
        return "parquet"
    if ending in (".parquet", ".pq"):
        raise NoText(
            f"{name} cannot be read as Parquet (it does not begin with PAR1): get it again, or say what it is with --format"
        )
    refuse_binary(head, about, packed, ending)
    begin = head_text.lstrip()
    if begin[:1] == b"<" and wanted == "auto":
        _refuse_markup(begin, ending, about)
    named = "json" if wanted == "json" else NAMES.get(ending, "")
    if begin[:1] in (b"{", b"[") or named in ("json", "jsonl"):
        if found := _json(begin, named if named in ("json", "jsonl") else "", about, whole):
            return found
        if named in ("json", "jsonl"):
            return "jsonl"
    if named in ("csv", "tsv"):
        return named
    return _separated(head_text, field) or "text"


# --- markup, JSON and tables


def _refuse_markup(begin: bytes, ending: str, about: About) -> None:
    after = re.sub(rb"(?s)\A(?:\s*(?:<\?xml.*?\?>|<!--.*?-->))*\s*", b"", begin).lower()
    # A piece of a page, dense with tags. Markdown may begin with a tag, too.
    piece = re.match(
        rb"<(?:div|p|span|table|ul|ol|h[1-6]|article|section|main|nav|script|style|meta|title)[\s>]", after
    )
    if (
        re.match(rb"<!doctype\s+html|<(?:html|head|body)[\s>]", after)
        or ending in (".html", ".htm", ".xhtml")
        or (piece and ending not in (".md", ".markdown") and after.count(b"</") * 200 > len(after))
    ):
        raise about.refusal("HTML", about.filter("pandoc -f html -t plain --wrap=none"))
    if (
        begin.startswith(b"<?xml")
        or re.match(rb"<!doctype\s|<(?:svg|rss|feed|mediawiki)[\s>]|<[a-z][\w:.-]*\s[^<>]*\bxmlns\b", after)
        or ending == ".xml"
    ):
        raise about.refusal("XML", about.filter("xmllint --xpath 'string(/)' -"))


def _json(begin: bytes, named: str, about: About, whole: bool) -> str:
    """ "jsonl", "json" (an array of objects), or "" if it is not JSON. `named`: the format that its name tells."""
    text = begin.decode("utf-8", "surrogateescape")
    if text.startswith("["):
        value = parsed(text) if whole else None
        if re.match(r"\[\s*\{", text) and (value if whole and not named else _begins_object(text[1:].lstrip())):
            return "json"
        if re.fullmatch(r"\[\s*\]\s*", text) and named in ("json", "jsonl"):
            return "json"
        first = parsed(text.split("\n", 1)[0])
        if named == "json" and (isinstance(value, list) or re.match(r"\[\s*(?:\"|\[|-?\d|null|true|false)", text)):
            if isinstance(first, list) and "\n" in text.strip():
                return "jsonl"  # reading it will tell which lines are not objects
            raise about.refusal(
                "a JSON array of other things than objects", about.filter("jq -c '.[] | {text: .}'", ".jsonl")
            )
        return ""
    lines = [line for line in text.split("\n") if line.strip()]
    if not whole and len(lines) > 1:
        lines.pop()  # it may be cut
    if not lines:
        return ""
    objects = [bool(parsed(line)) and line.lstrip().startswith("{") for line in lines[:100]]
    alike = [_begins_object(line.lstrip()) for line in lines[:100]]
    if (named and any(objects) and alike[0]) or (
        objects[0] and 10 * sum(alike) >= 9 * len(alike) and 2 * sum(objects) >= len(objects)
    ):
        return "jsonl"
    if len(lines) == 1 and not whole and _begins_object(text):
        return "jsonl"  # its first line is longer than `begin`
    if named == "jsonl" or not text.startswith("{"):
        return ""
    # One or more objects, each spread over several lines.
    if _all_objects(text) if whole else re.match(r'\{\s*\n\s*"(?:[^"\\\n]|\\.)*"\s*:', text):
        value = parsed(text) if whole else None
        lists = [key for key, held in value.items() if isinstance(held, list)] if isinstance(value, dict) else []
        inside = f".{json.dumps(lists[0])}[]" if lists else "."
        raise about.refusal(
            "JSON objects of many lines, not one a line", about.filter(f"jq -c {shlex.quote(inside)}", ".jsonl")
        )
    return ""


def parsed(text: str) -> object:
    """The JSON value of `text`; None if it is not JSON, or nested too deeply for Python."""
    try:
        value: object = JSON.decode(text)
    except (ValueError, RecursionError):
        return None
    return value


def _all_objects(text: str) -> bool:
    """Whether `text` is a sequence of JSON objects and nothing else."""
    at = 0
    while text := text[at:].lstrip():
        try:
            value, at = JSON.raw_decode(text)
        except (ValueError, RecursionError):
            return False
        if not isinstance(value, dict):
            return False
    return True


def _begins_object(text: str) -> bool:
    """Whether `text` begins with a JSON object, which may be cut."""
    return bool(re.match(r'\{\s*(?:\}|"(?:[^"\\]|\\.)*"\s*:\s*["\[{\dtfn-])', text))


def _separated(head: bytes, field: str) -> str:
    """ "csv" or "tsv" if the first line names a column `field` and the next lines are divided too; else ""."""
    lines = head.decode("utf-8", "replace").splitlines()[:20]
    for delimiter, found in ((",", "csv"), ("\t", "tsv")):
        names = [cell.strip().strip('"') for cell in lines[0].split(delimiter)] if len(lines) > 2 else []
        if len(names) > 1 and field in names and all(line.count(delimiter) for line in lines[1:-1] if line.strip()):
            return found
    return ""
