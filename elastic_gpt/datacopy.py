"""Prepared data from an object store (--data.dir s3://bucket/data): copied to this machine once, for all workers and runs.

    CACHE/3f2a.../            a copy, named by the digest of its meta.json: whole, or not there
    CACHE/3f2a....partial/    one that is being made; whoever comes next goes on with it
    CACHE/3f2a....lock        held by who makes the copy, and shared by all who use it

Copies that nobody uses make room for new ones, those used longest ago first.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from elastic_gpt.storage import as_os_error, open_url
from prepare.progress import Meter, phase
from prepare.tokens import META, DataError, Meta, read_meta

PIECE = 16 << 20  # bytes asked for at a time: what a kill costs
_held: list[IO[bytes]] = []  # the locks of the copies that this process uses, until it ends


def cache_folder() -> Path:
    """Where copies lie unless `data.cache` says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elastic-gpt" / "data"


def local_copy(url: str, cache: Path, most_bytes: int) -> Path:
    """A folder of this machine with the data of `url`, every file of it as its meta.json says.

    Args:
        cache: the folder of all copies.
        most_bytes: of all copies together.

    Raises:
        DataError: if there is no data, if it is not what its meta.json says, or if it has no room.
        Unreachable: if the store does not answer; the next try goes on from what has come.
    """
    files, root = open_url(url, "data.dir")
    try:
        with as_os_error(f"read {url}/{META}"):
            text = files.cat_file(f"{root}/{META}")
    except FileNotFoundError as error:
        raise DataError(f"no {META} in {url}: prepare the data first, and copy its folder there") from error
    folder = cache / hashlib.sha256(text).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    lock = folder.with_suffix(".lock").open("ab")
    _held.append(lock)
    while True:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if folder.exists():
            os.utime(lock.name)
            return folder
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other workers of this machine wait above
        if not folder.exists():
            _copy(files, root, url, text, folder, most_bytes)


def _copy(files: Any, root: str, url: str, text: bytes, folder: Path, most_bytes: int) -> None:
    partial = folder.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    (partial / META).write_bytes(text)
    meta = read_meta(partial)
    assert meta
    expected = _expected(meta, url)
    needed = sum(size for size, _ in expected.values())
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    _make_room(folder, needed, there, most_bytes, url)
    with phase()(f"copying {url} to {folder.parent}", needed) as meter:
        for name, (size, sha256) in expected.items():
            path = partial / name
            path.parent.mkdir(exist_ok=True)
            try:
                _fetch(files, f"{root}/{name}", path, size, meter)
            except FileNotFoundError as error:
                raise DataError(
                    f"{url}/{name} is missing although {META} names it: copy the folder there again"
                ) from error
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                path.unlink()
                raise DataError(f"{url}/{name} is not what {META} there says: copy the prepared folder there again")
    partial.rename(folder)


def _expected(meta: Meta, url: str) -> dict[str, tuple[int, str]]:
    """Size in bytes (of the tokenizer's file 0: it is small) and sha256 of each file."""
    itemsize = np.dtype(meta.dtype).itemsize
    found = {split.file: (split.tokens * itemsize, split.sha256) for split in meta.splits.values()}
    if meta.tokenizer.file and meta.tokenizer.sha256:
        found[meta.tokenizer.file] = (0, meta.tokenizer.sha256)
    for name in found:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"{url}/{META} names {name}, which is no file of that folder: prepare the data again")
    return found


def _fetch(files: Any, source: str, path: Path, size: int, meter: Meter) -> None:
    """The whole of a small file, or of a large one what is still missing."""
    if not size:
        with as_os_error(f"read {source}"):
            path.write_bytes(files.cat_file(source))
        return
    with path.open("ab") as file:
        meter.advance(min(file.tell(), size))
        while (start := file.tell()) < size:
            end = min(start + PIECE, size)
            with as_os_error(f"read {source}"):
                piece = files.cat_file(source, start=start, end=end)
            if len(piece) != end - start:
                path.unlink()
                raise DataError(
                    f"{source} gave {len(piece):,} bytes for {end - start:,}: it is not the file that {META} names, or"
                    " the store has no parts of files: copy the prepared folder to another"
                )
            file.write(piece)
            meter.advance(len(piece))


def _make_room(folder: Path, needed: int, there: int, most_bytes: int, url: str) -> None:
    cache = folder.parent
    if needed > most_bytes:
        raise DataError(
            f"{url} has {needed / 1e9:,.3g} GB, more than --data.cache-gb allows: raise it to copy the data"
        )

    def room() -> bool:
        return shutil.disk_usage(cache).free >= needed - there

    def fits() -> bool:
        files = (path for path in cache.rglob("*") if path.is_file() and folder.stem not in str(path))
        return sum(path.stat().st_size for path in files) + needed <= most_bytes and room()

    for lock in sorted(cache.glob("*.lock"), key=lambda lock: lock.stat().st_mtime):
        if not fits() and lock.stem != folder.stem:
            with lock.open("ab") as file, contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while somebody uses it
                for old in (lock.with_suffix(""), lock.with_suffix(".partial")):
                    shutil.rmtree(old, ignore_errors=True)
    if not room():
        raise DataError(
            f"{cache} has no room for the {needed / 1e9:,.3g} GB of {url}: name another --data.cache FOLDER"
        )
    if not fits():
        raise DataError(
            f"{cache} holds copies that are in use, and with {needed / 1e9:,.3g} GB of {url} they are more than"
            " --data.cache-gb allows: raise it"
        )
