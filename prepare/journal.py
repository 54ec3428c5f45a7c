"""Work that survives its process: a folder `.prepare` beside the output, with a journal line for each finished chunk.

    .prepare/lock            held by the process that works here
    .prepare/plan.json       the settings and inputs of the work
    .prepare/train.bin       (and val.bin) the tokens so far
    .prepare/journal.jsonl   [text: bytes, crc32], [train: bytes, crc32], [val: ...], repaired, unknown; a line a chunk
    .prepare/tokenizer/      the tokenizer's files

A line is written after the tokens that it describes. The next run checks both and cuts off whatever
kill -9 or a power cut left behind the last good line. So nothing needs to be flushed on the way.
"""

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prepare.encoder import Chunk, Coded
from prepare.tokens import DataError, write_file

STAGE = ".prepare"
STDIN = "stdin"
VERSION = 4
"""Version of plan.json, journal.jsonl, and how text is cut into chunks. Work of another version is started afresh."""
SIDES = ("train.bin", "val.bin")
_BLOCK = 1 << 20


@contextmanager
def stage(output_dir: Path) -> Iterator[Path]:
    """The folder to work in, locked for this process. It is still there afterwards; `remove` deletes it.

    Makes `output_dir` if it is missing. Raises DataError if it cannot be written, or another
    process works there.
    """
    folder = output_dir / STAGE
    try:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The process before may have removed the folder while we waited for the lock.
                if os.fstat(lock).st_ino == (folder / "lock").stat().st_ino:
                    break
            except FileNotFoundError:
                pass
            except BlockingIOError:
                os.close(lock)
                raise DataError(
                    f"another prepare is at work in {output_dir}: wait for it, or choose another --output_dir"
                ) from None
            os.close(lock)
    except OSError as error:
        raise DataError(f"cannot write to {output_dir} ({error.strerror}): choose another --output_dir") from error
    try:
        yield folder
    finally:
        os.close(lock)


def clear(folder: Path) -> None:
    """Deletes all work in the stage `folder`. Its lock and the copy of standard input stay."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("lock", STDIN):
            path.unlink()


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def read_plan(folder: Path) -> dict[str, Any] | None:
    """The plan of unfinished work of this version; None if there is none."""
    try:
        plan: dict[str, Any] = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return plan if plan.get("version") == VERSION else None


def write_plan(folder: Path, plan: dict[str, Any]) -> None:
    write_file(folder / "plan.part", json.dumps(plan | {"version": VERSION}, indent=1).encode())
    (folder / "plan.part").replace(folder / "plan.json")


class Changed(Exception):
    """The text is not the one that the journal describes."""


class Journal:
    """The two unfinished token files, and the journal lines that say which part of them is whole."""

    def __init__(self, folder: Path) -> None:
        self.done: list[dict[str, Any]] = []
        """The line of each chunk that does not have to be encoded again."""
        self.repaired: Counter[int] = Counter()
        """Index of a source to the number of places that were not valid UTF-8."""
        self.unknown = 0
        """Words that became <unk>."""
        self._hashes = [hashlib.sha256(), hashlib.sha256()]
        self.bytes = [0, 0]
        """Bytes so far of train.bin and val.bin."""
        path = folder / "journal.jsonl"
        path.touch()
        self._files = [open(folder / side, "a+b", buffering=0) for side in SIDES]  # noqa: PTH123, SIM115
        size = 0
        with path.open("rb") as lines:
            for line in lines:
                if not (entry := _parsed(line)) or not self._is_whole(entry):
                    break
                self.done.append(entry)
                self._count(entry)
                size += len(line)
        os.truncate(path, size)
        for file, length in zip(self._files, self.bytes, strict=True):
            file.truncate(length)
        self._lines = path.open("ab", buffering=0)

    def is_done(self, number: int, chunk: Chunk) -> bool:
        """Whether chunk `number` is already encoded. Raises Changed if its text was another one then."""
        if number >= len(self.done):
            return False
        if self.done[number]["text"] != [chunk.size, chunk.crc]:
            raise Changed
        return True

    def add(self, chunk: Chunk, coded: Coded) -> None:
        for side, data in enumerate(coded.ids):
            _write(self._files[side], data)
            self._hashes[side].update(data)
            self.bytes[side] += len(data)
        entry = {
            "text": [chunk.size, chunk.crc],
            "tokens": [[len(data), zlib.crc32(data)] for data in coded.ids],
            "repaired": list(coded.repaired.items()),
            "unknown": coded.unknown,
        }
        _write(self._lines, json.dumps(entry).encode() + b"\n")
        self._count(entry)

    def finish(self) -> list[str]:
        """Flushes the token files to disk. Returns their sha256."""
        for file in self._files:
            os.fsync(file.fileno())
        return [digest.hexdigest() for digest in self._hashes]

    def close(self) -> None:
        for file in (*self._files, self._lines):
            file.close()

    def _count(self, entry: dict[str, Any]) -> None:
        self.repaired.update(dict(entry["repaired"]))
        self.unknown += entry["unknown"]

    def _is_whole(self, entry: dict[str, Any]) -> bool:
        """Whether the bytes that `entry` describes come next in both files. If so, moves past them."""
        hashes = [digest.copy() for digest in self._hashes]
        for side, (length, crc) in enumerate(entry["tokens"]):
            self._files[side].seek(self.bytes[side])
            seen = 0
            while length > 0 and (data := self._files[side].read(min(length, _BLOCK))):
                seen = zlib.crc32(data, seen)
                hashes[side].update(data)
                length -= len(data)
            if length or seen != crc:
                return False
        self._hashes = hashes
        self.bytes = [size + length for size, (length, _) in zip(self.bytes, entry["tokens"], strict=True)]
        return True


def _parsed(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return entry if set(entry) == {"text", "tokens", "repaired", "unknown"} else None


def _write(file: Any, data: bytes) -> None:
    """Writes all of `data`: a full disk may take a part of it, and report the error only at the next write."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
