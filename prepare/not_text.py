"""Files that are not text: what they seem to be, by their first bytes, and a command that makes text of them.

The command is a shell line that works as printed, whatever bytes the name has, and never overwrites
a file.
"""

import codecs
import os
import re
import shlex
import tarfile
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from prepare.encodings import is_binary, wide_encoding
from prepare.streams import PACKINGS, UNPACK, packing_of
from prepare.tokens import DataError


class NoText(DataError):
    """A file that cannot be read as text. The message says what it seems to be, and which command helps."""


class About:
    """A file to refuse: its name for a person, its path or URL, and how it is packed."""

    def __init__(self, name: str, place: str, packing: str) -> None:
        self.name, self.place, self.packing = name, place, packing

    def refusal(self, what: str, cure: str) -> NoText:
        return NoText(f"{self.name} seems to be {what}: {cure}")

    def filter(self, command: str, ending: str = ".txt") -> str:
        """A shell line that sends the file through `command`, which reads standard input and writes standard output."""
        if self.name == "standard input":
            return f"send it through {command}"
        return filtered(self.place, self.packing, command, ending)


def filtered(place: str, packing: str, command: str, ending: str = ".txt") -> str:
    """A shell line that unpacks a file, sends it through `command` (a filter) and writes a new one beside it."""
    unpack = UNPACK.get(packing, "")
    if "://" in place:
        stem = PurePosixPath(urlsplit(place).path).name.split(".")[0] or "text"
        return (
            " | ".join(filter(None, [f"curl -sSfL {quoted(place)}", unpack, command])) + f" > {quoted(stem + ending)}"
        )
    new = quoted(str(_new_file(Path(place), ending)))
    if unpack:
        return f"{unpack} < {quoted(place)} | {command} > {new}"
    if command.startswith("iconv"):
        return f"{command} {quoted(place)} > {new}"
    return f"{command} < {quoted(place)} > {new}"


def _new_file(path: Path, ending: str) -> Path:
    """The path of a file beside `path` that does not exist yet."""
    stem = path.name.split(".")[0] or "text"
    while (new := path.with_name(stem + ending)).exists():
        stem += ".new"
    return new


def quoted(path: str) -> str:
    """`path` as one word of a shell line, whatever bytes it has."""
    path = f"./{path}" if path.startswith("-") else path
    if path.isprintable():
        return shlex.quote(path)
    escaped = "".join(chr(b) if 0x20 <= b < 0x7F and b not in b"'\\" else f"\\x{b:02x}" for b in os.fsencode(path))
    return f"$'{escaped}'"


def _extracted(about: About, command: str, target: str) -> str:
    """What to do with an archive: a shell line that unpacks it into a folder."""
    if "://" in about.place or about.name == "standard input":
        return f"unpack it ({command.split()[0]}) and name the folder"
    folder = quoted(str(Path(about.place).with_name(Path(about.place).name.split(".")[0] + ".files")))
    unpack = f"{command} {quoted(about.place)}"
    if about.packing:
        unpack = f"{UNPACK[about.packing]} < {quoted(about.place)} | {command} -"
    return f"name the folder that this makes: mkdir -p {folder} && {unpack} {target} {folder}"


# --- formats with a signature

_LEAVE_OUT = "leave it out (--format text reads it all the same)"
_SIGNATURES: list[tuple[int, bytes, str, str]] = [
    (0, b"%PDF-", "a PDF document", "pdftotext"),
    (0, b"{\\rtf", "a document in Rich Text Format", "soffice"),
    (0, b"%!PS", "a PostScript document", "ps2ascii"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document of the old kind (.doc, .xls, .ppt)", "soffice"),
    (0, b"\x7fELF", "a program (ELF)", ""),
    (0, b"\xcf\xfa\xed\xfe", "a program (Mach-O)", ""),
    (0, b"\xca\xfe\xba\xbe", "a program (Java class or Mach-O)", ""),
    (0, b"\0asm", "a program (WebAssembly)", ""),
    (0, b"\x89PNG\r\n\x1a\n", "a picture (PNG)", ""),
    (0, b"\xff\xd8\xff", "a picture (JPEG)", ""),
    (0, b"GIF87a", "a picture (GIF)", ""),
    (0, b"GIF89a", "a picture (GIF)", ""),
    (0, b"II*\0", "a picture (TIFF)", ""),
    (0, b"MM\0*", "a picture (TIFF)", ""),
    (0, b"\0\0\1\0", "a picture (icon)", ""),
    (8, b"WEBP", "a picture (WebP)", ""),
    (8, b"WAVE", "sound (WAV)", ""),
    (8, b"AVI ", "a film (AVI)", ""),
    (4, b"ftyp", "a film or a picture (MP4, HEIC)", ""),
    (0, b"\x1aE\xdf\xa3", "a film (Matroska)", ""),
    (0, b"ID3\2", "sound (MP3)", ""),
    (0, b"ID3\3", "sound (MP3)", ""),
    (0, b"ID3\4", "sound (MP3)", ""),
    (0, b"OggS\0", "sound (Ogg)", ""),
    (0, b"fLaC\0", "sound (FLAC)", ""),
    (0, b"SQLite format 3\0", "a database (SQLite)", ""),
    (0, b"\x89HDF\r\n", "an HDF5 file", ""),
    (0, b"\x93NUMPY", "a NumPy array", ""),
    (0, b"GGUF\3\0", "a model (GGUF)", ""),
    (0, b"ARROW1\0\0", "an Arrow file", "arrow"),
    (0, b"FEA1", "a Feather file", "arrow"),
    (0, b"Obj\1", "an Avro file", ""),
    (0, b"\x04\x22\x4d\x18", "packed with lz4", "lz4 -dc"),
    (0, b"\xff\x06\0\0sNaPpY", "packed with snappy", "snzip -dc"),
    (0, b"LZIP\1", "packed with lzip", "lzip -dc"),
    (0, b"\x89LZO\0", "packed with lzop", "lzop -dc"),
    (0, b"\x1f\x9d", "packed with compress", "gzip -dc"),
    (0, b"\x5d\0\0", "packed with lzma", "xz -dc --format=lzma"),
    (0, b"!<arch>\n", "an ar archive (a library, a .deb)", ""),
    (0, b"WARC/1.", "a web archive (WARC)", ""),
    (0, b"version https://git-lfs.github.com/spec/", "a pointer of Git LFS, not the file", "git-lfs"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z"),
    (0, b"Rar!\x1a\x07", "a RAR archive", "unrar"),
]  # fmt: skip


def refuse_binary(head: bytes, about: About, packed: str, ending: str) -> None:
    """Raises NoText if `head` does not begin as text does.

    `packed` and `ending` are the endings of its name, as formats.suffixes gives them.
    """
    if about.packing and (again := packing_of(head)):
        raise about.refusal(
            f"packed twice ({again} within {about.packing})", about.filter(UNPACK[again], ending or ".txt")
        )
    for offset, magic, what, tool in _SIGNATURES:
        if head[offset : offset + len(magic)] == magic and (offset == 0 or is_binary(head)):
            raise about.refusal(what, _cure(tool, about))
    if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"%PDF-"):  # PDF readers also skip what stands before it
        raise about.refusal("a PDF document", _cure("pdftotext", about))
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        raise about.refusal(*_zip(head, about))
    if _is_tar(head):
        raise about.refusal("a tar archive", _extracted(about, "tar xf", "-C"))
    if wide := wide_encoding(head):
        cure = about.filter(f"iconv -f {wide} -t utf-8", f".utf8{ending or '.txt'}")
        marked = "with a byte order mark" if wide in ("UTF-16", "UTF-32") else "without a mark"
        raise about.refusal(f"{wide} text {marked}", cure)
    if head.isascii() and (shifted := re.search(rb"\x1b(?:\$[@AB]|\$[()][A-D])", head)):
        kind = {b"$A": "CN", b"$)A": "CN", b"$)C": "KR"}.get(shifted[0][1:], "JP")
        cure = about.filter(f"iconv -f ISO-2022-{kind} -t utf-8", f".utf8{ending or '.txt'}")
        raise about.refusal(f"ISO-2022-{kind} text", cure)
    if head.startswith(b"MZ") and is_binary(head):
        raise about.refusal("a program (Windows)", _LEAVE_OUT)
    if head.startswith(b"BM") and is_binary(head):
        raise about.refusal("a picture (BMP)", _LEAVE_OUT)
    if is_binary(head):
        if packed and not about.packing:
            raise NoText(
                f"{about.name} is called {packed}, and does not begin as {PACKINGS[packed]} does: it cannot be unpacked, "
                "get it again"
            )
        raise about.refusal("binary data (bytes that text does not have)", _LEAVE_OUT)


def _cure(tool: str, about: About) -> str:
    place = quoted(about.place)
    if not tool:
        return _LEAVE_OUT
    if tool == "git-lfs":
        return "fetch what it points to: git lfs pull"
    if about.packing or "://" in about.place or about.name == "standard input":
        return f"take it to a file of its own, and its text out of it ({tool})"
    new = quoted(str(_new_file(Path(about.place), ".txt")))
    return {
        "pdftotext": f"pdftotext {place} {new}",
        "ps2ascii": f"ps2ascii {place} {new}",
        "soffice": f"soffice --headless --convert-to txt:Text {place}",
        "arrow": "write it as Parquet (pyarrow.parquet.write_table)",
        "7z": f"7z x {place}",
        "unrar": f"unrar x {place}",
    }.get(tool) or about.filter(tool)


def _zip(head: bytes, about: About) -> tuple[str, str]:
    place = quoted(about.place)
    for inside, what in (
        (b"word/", "Word"),
        (b"xl/", "Excel"),
        (b"ppt/", "PowerPoint"),
        (b"opendocument", "OpenDocument"),
    ):
        if inside in head:
            kind = "csv" if what == "Excel" or b"spreadsheet" in head else "txt:Text"
            return f"an office document ({what})", f"soffice --headless --convert-to {kind} {place}"
    if b"application/epub+zip" in head:
        return "an e-book (EPUB)", f"pandoc -t plain {place} -o {quoted(str(_new_file(Path(about.place), '.txt')))}"
    if b".npy" in head[:200]:
        return "NumPy arrays (npz)", _LEAVE_OUT
    if b"data.pkl" in head[:200]:
        return "a model (PyTorch)", _LEAVE_OUT
    return "a zip archive", _extracted(about, "unzip -q", "-d")


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")  # checks the checksum of the header
    except tarfile.HeaderError:
        return False
    return True
