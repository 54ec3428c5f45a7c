"""Prepared data on an object store (--output-dir s3://bucket/data): made on this machine, put there whole, and waited for.

An object store renames nothing, so meta.json goes last: where it is, the other files are.
"""

import hashlib
import time
from pathlib import Path
from typing import Any

from prepare.progress import Phase
from prepare.sources import Say
from prepare.streams import TransferError, store_of, unreachable
from prepare.tokens import META, UNFINISHED, Meta, user_cache

LOOK_SECONDS = 2.0


def workplace(url: str) -> Path:
    """The folder of this machine in which the data of `url` are made: the same after a kill, so that they go on."""
    return user_cache() / "prepared" / hashlib.sha256(url.encode()).hexdigest()[:16]


def put(folder: Path, url: str, meta: Meta, phase: Phase) -> None:
    """Copies what `prepare` made in `folder` to `url`, meta.json last; nothing where the same data are there.

    Raises:
        DataError: if the store refuses it.
        TransferError: if the store does not answer; another try may help.
    """
    store, root = store_of(url)
    mine, there = (folder / META).read_bytes(), _read(store, root, url)
    if there == mine:
        return
    files = [split.file for split in meta.splits.values()]
    files += [meta.tokenizer.file] if meta.tokenizer.file else []
    sizes = {name: (folder / name).stat().st_size for name in files}
    try:
        if there is not None:  # stopped on the way, new train.bin and old val.bin would pass for one data set
            store.pipe_file(f"{root}/{META}", UNFINISHED)
        with phase(f"copying to {url}", sum(sizes.values())) as meter:
            for name, size in sizes.items():
                store.put_file(str(folder / name), f"{root}/{name}")
                meter.advance(size)
        store.pipe_file(f"{root}/{META}", mine)
    except Exception as error:  # each store has kinds of its own
        raise unreachable(url, error, doing="written") from error


def is_there(place: Path | str) -> bool:
    """Whether a folder or URL holds prepared data, all of them. Raises DataError or TransferError, as `put` does."""
    if isinstance(place, str):
        text = _read(*store_of(place), place)
    else:
        text = (place / META).read_bytes() if (place / META).exists() else None
    return text not in (None, UNFINISHED)


def wait(place: Path | str, seconds: float, say: Say) -> bool:
    """Until somebody has prepared the data at `place`, `seconds` at most; whether they are there. Raises DataError."""
    end, said = time.monotonic() + seconds, ""
    while True:
        try:
            if is_there(place):
                return True
            note = f"waiting for data in {place}"
        except TransferError as error:
            note = f"{error} Trying on."
        if time.monotonic() >= end:
            return False
        if note != said:
            say(note)
        said = note
        time.sleep(LOOK_SECONDS)


def _read(store: Any, root: str, url: str) -> bytes | None:
    """meta.json of a store, None where there is none."""
    try:
        return bytes(store.cat_file(f"{root}/{META}"))
    except FileNotFoundError:
        return None
    except Exception as error:
        raise unreachable(url, error) from error
