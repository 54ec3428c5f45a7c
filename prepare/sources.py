"""Finds the text to read: files, folders, globs, URLs, standard input, or the sample. Tells what it leaves out."""

import difflib
import glob
import os
import platform
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from prepare import formats, streams
from prepare.formats import NAMES, suffixes
from prepare.frontdoor import printable
from prepare.marks import BOM
from prepare.not_text import NoText
from prepare.streams import PACKINGS, store_of, unreachable
from prepare.tokens import META, DataError

UNITS = {"text": "byte", "jsonl": "line", "json": "element", "csv": "line", "tsv": "line", "parquet": "row"}
"""For each format, the unit in which a place in a file is told."""
_ENDINGS = f"{', '.join(NAMES)} (plain or {', '.join(PACKINGS)})"

BARRED_FOLDERS = "folders that this user may not read"

Say = Callable[[str], None]
"""Called with one line that a person should see."""


@dataclass(frozen=True)
class Source:
    """A file, URL or the sample: something to read documents from, as often as needed."""

    name: str
    """What the user called it, in printable characters."""
    place: str
    """The path or URL to open; "" for the sample."""
    size: int
    """Size in bytes, as it is stored (packed)."""
    state: str = ""
    """Changes when the file is written to: its modification time, or what the store has instead."""
    kind: str = "text"
    """Its format, one of formats.FORMATS."""
    packing: str = ""
    """How it is packed, a value of streams.PACKINGS; "" if it is not."""
    mark: int = 0
    """Length in bytes of the byte order mark at its beginning, which is not text; 0 if it has none."""

    def where(self, row: int, offset: int) -> str:
        """In words, the place that a Piece's `row` and `offset` tell."""
        return f"{UNITS[self.kind]} {offset if self.kind == 'text' else row:,}"


@dataclass
class LeftOut:
    """The files of folders and globs that are not read, by the reason."""

    of: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, path: object) -> None:
        self.of.setdefault(reason, []).append(printable(str(path)))

    def tell(self, say: Say) -> None:
        for reason, names in self.of.items():
            say(f"{len(names):,} left out: {reason} (first: {names[0]})")


def sample() -> Source:
    """The sample: topics of Python's own documentation, 79 documents, 0.46 MB of real English in Python 3.11."""
    size = sum(len(text.encode()) for text in sample_texts())
    return Source(f"pydoc_data.topics of Python {platform.python_version()}", "", size)


def find(
    names: Sequence[str],
    stdin: Path | None = None,
    *,
    wanted: str = "auto",
    field: str = "text",
    say: Say = lambda _: None,
) -> list[Source]:
    """The sources that `names` stand for, in that order. The files of a folder or glob come in the order of their names.

    Args:
        names: each a file, a folder, a glob, a URL of any of these (over HTTP, a folder ends in /), or `-` for standard
            input. Of a folder, the files with an ending in formats.NAMES are read, at any depth and behind links too.
        stdin: the file to which standard input was saved.
        wanted, field: see formats.format_of.
        say: is told what is left out.

    Raises DataError if something is not there or cannot be read as text.
    """
    sources: list[Source] = []
    left_out = LeftOut()
    try:
        for name in names:
            if not name:  # the system would take it for the current folder
                raise DataError("an input has no name: is a variable empty?")
            if name == "-":
                assert stdin is not None
                found = [_saved(stdin)]
            else:
                found = _remote(name, left_out) if "://" in name else _local(name, left_out)
            several = name != "-" and (len(found) > 1 or not _named(name))
            for source in found:
                looked_at = _looked_at(source, wanted, field, several, left_out, say)
                sources += [looked_at] if looked_at else []
    finally:
        left_out.tell(say)
    if not sources:
        raise DataError(f"there is nothing to read in {', '.join(map(printable, names))}: all of it was left out")
    _tell_repeated(sources, say)
    return sources


def _named(name: str) -> bool:
    """Whether the user named one file, and not a folder or a glob."""
    return "://" in name or _what(Path(name)) != "folder"


def _saved(stdin: Path) -> Source:
    crc = 0
    with stdin.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return Source("standard input", str(stdin), stdin.stat().st_size, f"crc {crc:08x}")


def _looked_at(source: Source, wanted: str, field: str, several: bool, left_out: LeftOut, say: Say) -> Source | None:
    """The source with its format; None if it has nothing to read but is one of several."""
    packing, head = streams.head(source.place, source.name, source.size)
    packed = suffixes(source.place)[1]
    if not head and not packing:
        if packed:
            raise DataError(f"{source.name} is empty, and no whole {packed} file is: get it again")
        if several:
            left_out.add("empty files", source.name)
            return None
        return source
    try:
        kind = formats.format_of(
            head,
            source.name,
            source.place,
            packing,
            whole=len(head) < streams.HEAD_BYTES,
            field=field,
            wanted=wanted,
        )
    except NoText:
        if several and suffixes(source.place)[0] == ".json" and head.lstrip()[:1] == b"{":
            left_out.add("files of one JSON object in many lines, which may describe the others", source.name)
            return None
        raise
    if packed and not packing:
        if streams.is_stump(head, PACKINGS[packed]):
            raise DataError(
                f"{source.name} ends after {len(head)} bytes, and no whole {packed} file is so short: get it again"
            )
        say(f"{source.name} is called {packed}, but is not packed: it is read as it is")
    if wanted == "auto" and head.count(0) and kind == "text":
        say(f"{source.name} has NUL bytes: they are read as characters")
    mark = len(BOM) if head.startswith(BOM) and kind != "parquet" else 0
    return replace(source, kind=kind, packing=packing, mark=mark)


def _tell_repeated(sources: Sequence[Source], say: Say) -> None:
    seen: set[object] = set()
    repeated = []
    for source in sources:
        place = source.place
        if "://" not in place:
            found = Path(place).stat()
            identity: object = (found.st_dev, found.st_ino)
        else:
            identity = place
        if identity in seen:
            repeated.append(source.name)
        seen.add(identity)
    if repeated:
        say(f"{len(repeated):,} files are read more than once, for they were named so (first: {repeated[0]})")


def _what(path: Path) -> str:
    """What is at `path`: "file", "folder", "other" (a pipe), "nothing", or "barred" if this user may not look."""
    try:
        mode = path.stat().st_mode
    except PermissionError:
        return "barred"
    except (OSError, ValueError):  # links in a circle, and names that are too long or have NULs
        return "nothing"
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def _barred(path: Path) -> DataError:
    return DataError(
        f"{printable(str(path))} may not be read by this user: chmod a+rX it and the folders above, or leave it out"
    )


def _local(name: str, left_out: LeftOut) -> list[Source]:
    path = Path(name)
    what = _what(path)
    if what == "barred":
        raise _barred(path)
    if what == "folder":
        if not os.access(path, os.R_OK | os.X_OK):
            raise _barred(path)
        files = sorted(_walk(path, left_out))
        if not files:
            why = "; ".join(f"{len(names):,} {reason}" for reason, names in left_out.of.items())
            raise DataError(
                f"{printable(name)} has no {_ENDINGS} file in it{f' (there are {why})' if why else ''}: name the files"
            )
    elif what != "nothing":
        files = [path]
    elif path.is_symlink():
        raise DataError(
            f"no such file: {printable(name)} is a link to {printable(str(path.readlink()))}, which is not there"
        )
    elif glob.has_magic(name):
        files = matching(name, left_out)
        if not files:
            why = "; ".join(f"{len(names):,} {reason}" for reason, names in left_out.of.items())
            raise DataError(
                f"no file matches {printable(name)}{f' (but {why})' if why else ''}: check the pattern; ** goes into folders"
            )
    else:
        folder = path.parent
        listed = folder.iterdir() if _what(folder) == "folder" and os.access(folder, os.R_OK | os.X_OK) else ()
        names = [entry.name for entry in listed if _what(entry) == "file"]
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"did you mean {folder / near[0]}?" if near else "check the path, or try --sample"
        raise DataError(f"no such file: {printable(name)} ({printable(hint)})")
    for file in files:
        if _what(file) == "other":
            raise DataError(
                f"{printable(str(file))} is a pipe or a device, and text is read more than once: give it as standard input, -"
            )
        if not os.access(file, os.R_OK):
            raise _barred(file)
    return [Source(printable(str(file)), str(file), *_file_state(file)) for file in files]


def _walk(top: Path, left_out: LeftOut) -> Iterator[Path]:
    """The text files below `top`. Links are followed last. Each folder is read once, so loops do no harm."""
    folders, links = [top], list[Path]()
    seen = set()
    while folders or links:
        folder = folders.pop(0) if folders else links.pop(0)
        found = folder.stat()
        if (found.st_dev, found.st_ino) in seen:
            left_out.add("links to a folder that is read already", folder)
            continue
        seen.add((found.st_dev, found.st_ino))
        if not os.access(folder, os.R_OK | os.X_OK):
            left_out.add(BARRED_FOLDERS, folder)
            continue
        entries = sorted(folder.iterdir())
        ours = (folder / META).is_file() and (folder / "train.bin").is_file()  # the output of an earlier prepare
        for path in entries:
            if path.name in (".prepare", "train.bin", "val.bin") or (ours and path.name in (META, "tokenizer")):
                continue
            what = _what(path)
            if path.name.startswith("."):
                left_out.add("hidden files and folders", path)
            elif what == "folder":
                (links if path.is_symlink() else folders).append(path)
            elif _unusable(path, what, left_out):
                pass
            elif suffixes(path.name)[0] in NAMES:
                yield path
            else:
                left_out.add("files of other endings", path)


def _unusable(path: Path, what: str, left_out: LeftOut) -> bool:
    """Whether `path`, which is not a folder, is left out whatever its name is."""
    if what == "nothing":
        left_out.add("links to nothing", path)
    elif what == "other":
        left_out.add("pipes, sockets and devices", path)
    elif what == "barred" or not os.access(path, os.R_OK):
        left_out.add("files that this user may not read", path)
    else:
        return False
    return True


def matching(pattern: str, left_out: LeftOut | None = None) -> list[Path]:
    """The files that match a glob, in the order of their names."""
    found = sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207 - Path.glob knows no absolute ones
    left_out = left_out or LeftOut()
    folders = {path for path in found if _what(path) == "folder"}
    # glob treats a folder that it may not list as empty.
    for folder in sorted(folders | set(map(Path, glob.glob(str(Path(pattern).parent), recursive=True)))):  # noqa: PTH207
        if _what(folder) == "folder" and not os.access(folder, os.R_OK | os.X_OK):
            left_out.add(BARRED_FOLDERS, folder)
        elif folder in folders and "**" not in pattern:
            left_out.add("folders, into which only ** goes", folder)
    return [path for path in found if path not in folders and not _unusable(path, _what(path), left_out)]


def _remote(url: str, left_out: LeftOut) -> list[Source]:
    store, path = store_of(url)
    web = url.lower().startswith(("http://", "https://"))
    try:
        if glob.has_magic(path.partition("?")[0] if web else path):
            paths = sorted(store.glob(path))
        # Over HTTP, only the final "/" tells a folder. fsspec's isdir would load a whole file to look for links in it.
        elif path.endswith("/") or store.info(path)["type"] == "directory":
            paths = []
            for found in sorted(store.find(path)):
                if suffixes(found)[0] in NAMES and not any(
                    part.startswith(".") for part in found.removeprefix(path).split("/")
                ):
                    paths.append(found)
                else:
                    left_out.add("files of other endings, or hidden", found)
        else:
            paths = [path]
    except Exception as error:
        # Over HTTP, fsspec says "not found" also if no server answers.
        if not isinstance(error.__cause__ or error, FileNotFoundError):
            raise unreachable(url, error) from error
        paths = []
    if not paths:
        raise DataError(f"there is nothing to read at {url}: check the address, and its files' endings ({_ENDINGS})")
    places = [store.unstrip_protocol(path) for path in paths]
    return [Source(printable(place), place, *_remote_state(place)) for place in places]


def _remote_state(place: str) -> tuple[int, str]:
    store, path = store_of(place)
    try:
        info = store.info(path)
    except Exception as error:
        raise unreachable(place, error) from error
    state = next((info[key] for key in ("ETag", "etag", "LastModified", "mtime", "created") if info.get(key)), "")
    return int(info.get("size") or 0), str(state)


def _file_state(path: Path) -> tuple[int, str]:
    found = path.stat()
    return found.st_size, str(found.st_mtime_ns)


def state(source: Source) -> tuple[int, str]:
    """The size and state (see Source) of the file as it is now."""
    if source.state.startswith("crc "):  # our own copy of standard input, which does not change
        return source.size, source.state
    return _remote_state(source.place) if "://" in source.place else _file_state(Path(source.place))


def sample_texts() -> list[str]:
    """The documents of `sample`."""
    from pydoc_data.topics import topics  # 0.5 MB of text, so it is imported only if needed

    return [topics[topic] for topic in sorted(topics)]
