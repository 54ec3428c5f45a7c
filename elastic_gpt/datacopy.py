"""Prepared data from an object store (--data.dir s3://bucket/data): copied to this machine once, for all workers and runs.

    CACHE/3f2a.../            a whole copy, named by the digest of its meta.json
    CACHE/3f2a....partial/    an unfinished copy; the next process goes on with it
    CACHE/3f2a....lock        locked by the process that makes the copy, then shared by all that use it

Unused copies are deleted to make room for new ones, the least recently used first.
"""

import contextlib
import fcntl
import hashlib
import os
import random
import shutil
import time
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from elastic_gpt.storage import as_os_error, open_url
from prepare.progress import Meter, phase
from prepare.tokens import META, DataError, Meta, read_meta, user_cache

TRIES = 100  # to be alone with a copy, 0.05 s each on average: others may come at the same moment
PIECE = 16 << 20  # bytes of one request: as much as a kill can cost
_held: list[IO[bytes]] = []  # locks of the copies that this process uses, held until it ends


def cache_folder() -> Path:
    """The folder for copies, unless `data.cache` names another."""
    return user_cache() / "data"


def local_copy(url: str, cache: Path, most_bytes: int) -> Path:
    """A folder of this machine with a copy of the data at `url`, checked against its meta.json.

    Args:
        cache: the folder for all copies.
        most_bytes: largest size of all copies together.

    Raises:
        DataError: if there is no data, it is not what its meta.json says, or there is no room for it.
        Unreachable: if the store does not answer. The next try goes on with the bytes that have come.
    """
    files, root = open_url(url, "data.dir")
    try:
        with as_os_error(f"read {url}/{META}"):
            text = files.cat_file(f"{root}/{META}")
    except FileNotFoundError as error:
        raise DataError(f"no {META} in {url}: prepare the data first, and copy its folder there") from error
    folder = cache / hashlib.sha256(text).hexdigest()[:16]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock").open("ab")
    except OSError as error:
        raise DataError(f"{cache} cannot be written ({error.strerror}): name another --data.cache FOLDER") from error
    _held.append(lock)
    refused = 0
    while True:
        fcntl.flock(lock, fcntl.LOCK_SH)  # the other workers of this machine wait here for the one that copies
        if _whole(folder, text, url):
            os.utime(lock.name)
            return folder
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:  # others come at this moment, or use a copy that was damaged since
            if (refused := refused + 1) == TRIES:
                raise DataError(
                    f"{folder} is damaged and in use: end the runs that use it, or name another --data.cache FOLDER"
                ) from error
            fcntl.flock(lock, fcntl.LOCK_UN)
            time.sleep(random.uniform(0.01, 0.1))
            continue
        _remove(folder)
        _copy(files, root, url, text, folder, most_bytes)


def _remove(folder: Path) -> None:
    try:
        if folder.is_dir():
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{folder} is damaged and cannot be removed ({error.strerror}): remove it") from error


def _whole(folder: Path, text: bytes, url: str) -> bool:
    """Whether all files are there with their sizes; a crash of the machine, or a person, may have taken some of a copy."""
    try:
        if (folder / META).read_bytes() != text:
            return False
        meta = read_meta(folder)
        assert meta
        return all(
            (folder / name).stat().st_size == size or not size for name, (size, _) in _expected(meta, url).items()
        )
    except (FileNotFoundError, NotADirectoryError):
        return False


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
    """Size in bytes and sha256 of each file. The tokenizer's file, which is small, has size 0."""
    itemsize = np.dtype(meta.dtype).itemsize
    found = {split.file: (split.tokens * itemsize, split.sha256) for split in meta.splits.values()}
    if meta.tokenizer.file and meta.tokenizer.sha256:
        found[meta.tokenizer.file] = (0, meta.tokenizer.sha256)
    for name in found:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"{url}/{META} names {name}, which is not a file of that folder: prepare the data again")
    return found


def _fetch(files: Any, source: str, path: Path, size: int, meter: Meter) -> None:
    """Download all of a small file, or the missing part of a large one."""
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
        used = 0
        for inside, _, names in os.walk(cache):
            for path in [Path(inside, name) for name in names if folder.stem not in f"{inside}/{name}"]:
                with contextlib.suppress(FileNotFoundError):  # another process may make room, too
                    used += path.stat().st_size
        return used + needed <= most_bytes and room()

    for lock in sorted(cache.glob("*.lock"), key=lambda lock: lock.stat().st_mtime):
        if not fits() and lock.stem != folder.stem:
            with lock.open("ab") as file, contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while a process uses the copy
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
