"""Which text there is: files, folders, globs, URLs, standard input, or the sample."""

import difflib
import glob
import os
import platform
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prepare.tokens import DataError

KINDS = {".txt": "text", ".jsonl": "rows", ".parquet": "table"}
PACKED = (".gz", ".zst")


@dataclass(frozen=True)
class Source:
    """Something to read documents from, as often as needed."""

    name: str
    """As the user named it."""
    place: str
    """The path or URL to open; empty for the sample."""
    size: int
    """Bytes as it is stored."""
    state: str = ""
    """What differs when it was written to since: time of the last change, or what the store gives instead."""

    @property
    def kind(self) -> str:
        """text, rows (JSON lines) or table (Parquet). What has another ending is text."""
        ending = Path(_unpacked(self.place)).suffix.lower()
        return KINDS.get(ending, "text")

    def where(self, row: int, offset: int) -> str:
        """In words, where a Piece's `row` and `offset` are."""
        return {"text": f"byte {offset:,}", "rows": f"line {row:,}", "table": f"row {row:,}"}[self.kind]


def sample() -> Source:
    """The topics of Python's own documentation: 79 documents, 0.46 MB of real English in Python 3.11."""
    size = sum(len(text.encode()) for text in sample_texts())
    return Source(f"pydoc_data.topics of Python {platform.python_version()}", "", size)


def find(names: Sequence[str], stdin: Path | None = None) -> list[Source]:
    """The sources that `names` stand for, in that order; a folder's and a glob's files in the order of their names.

    A name is a file, a folder (of .txt, .jsonl and .parquet files, each also .gz or .zst, at any depth), a glob, a URL of
    any of these (over HTTP, a folder's ends in /), or `-` for standard input, which was saved to `stdin`. Raises DataError
    where there is no such thing.
    """
    sources: list[Source] = []
    for name in names:
        if name == "-":
            assert stdin is not None
            crc = 0
            with stdin.open("rb") as file:
                while block := file.read(1 << 20):
                    crc = zlib.crc32(block, crc)
            sources.append(Source("standard input", str(stdin), stdin.stat().st_size, f"crc {crc:08x}"))
        else:
            sources.extend(_remote(name) if "://" in name else _local(name))
    return sources


def _local(name: str) -> list[Source]:
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_text(file.relative_to(path)) and file.is_file())
        if not files:
            raise DataError(
                f"{name} has no {', '.join(KINDS)} file in it (plain, {' or '.join(PACKED)}): name the files"
            )
    elif path.exists():
        files = [path]
    elif glob.has_magic(name):
        files = matching(name)
        if not files:
            raise DataError(f"no file matches {name}: check the pattern; ** goes into folders")
    else:
        folder = path.parent
        names = [entry.name for entry in folder.iterdir() if entry.is_file()] if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"did you mean {folder / near[0]}?" if near else "check the path, or try --sample"
        raise DataError(f"no such file: {path} ({hint})")
    for file in files:
        if not file.is_file():
            raise DataError(
                f"{file} is a pipe or a device, and text is read more than once: give it as standard input, -"
            )
        if not os.access(file, os.R_OK):
            raise DataError(f"{file} may not be read by this user: chmod a+r, or leave it out")
    return [Source(str(file), str(file), *_file_state(file)) for file in files]


def matching(pattern: str) -> list[Path]:
    """The files of a glob, in the order of their names."""
    found = map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob knows no absolute ones
    return sorted(file for file in found if file.is_file())


def _remote(url: str) -> list[Source]:
    store, path = store_of(url)
    try:
        if glob.has_magic(path):
            paths = sorted(store.glob(path))
        # Over HTTP a folder is what ends in "/"; isdir would load a whole file, to look for links.
        elif path.endswith("/") or store.info(path)["type"] == "directory":
            paths = sorted(found for found in store.find(path) if _is_text(Path(found)))
        else:
            paths = [path]
    except Exception as err:
        # HTTP's store says "not found" where no server answers, too.
        if not isinstance(err.__cause__ or err, FileNotFoundError):
            raise unreachable(url, err) from err
        paths = []
    if not paths:
        raise DataError(
            f"there is nothing to read at {url}: check the address, and its files' endings ({', '.join(KINDS)})"
        )
    places = [store.unstrip_protocol(path) for path in paths]
    return [Source(place, place, *_remote_state(place)) for place in places]


def unreachable(url: str, err: Exception) -> DataError:
    """What to say of a store's error; each has kinds of its own."""
    return DataError(
        f"{url} cannot be read ({err.__cause__ or err}): check the address, your credentials, and try again"
    )


def store_of(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path there. Raises DataError where its package is missing."""
    import fsspec  # 0.1 s, for URLs only

    try:
        store, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as err:
        raise DataError(f"{url} cannot be opened: {str(err).rstrip('.')}") from err
    store.invalidate_cache()  # from a cache of listings nobody sees that a file has changed
    return store, path


def _remote_state(place: str) -> tuple[int, str]:
    store, path = store_of(place)
    try:
        info = store.info(path)
    except Exception as err:
        raise unreachable(place, err) from err
    state = next((info[key] for key in ("ETag", "etag", "LastModified", "mtime", "created") if info.get(key)), "")
    return int(info.get("size") or 0), str(state)


def _file_state(path: Path) -> tuple[int, str]:
    stat = path.stat()
    return stat.st_size, str(stat.st_mtime_ns)


def state(source: Source) -> tuple[int, str]:
    """Size and state (as in Source) of what is there now."""
    if source.state.startswith("crc "):  # our own copy of standard input
        return source.size, source.state
    return _remote_state(source.place) if "://" in source.place else _file_state(Path(source.place))


def sample_texts() -> list[str]:
    """The documents of `sample`."""
    from pydoc_data.topics import topics  # 0.5 MB of text: loaded only where it is wanted

    return [topics[topic] for topic in sorted(topics)]


def _unpacked(name: str) -> str:
    """The name without .gz or .zst."""
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in PACKED else name


def _is_text(path: Path) -> bool:
    """Whether a file that nobody named is one of ours, by its path below the folder. Hidden ones are not."""
    return Path(_unpacked(path.name)).suffix.lower() in KINDS and not any(part.startswith(".") for part in path.parts)
