"""Work that survives its process: the folder `.prepare` beside the output, and a line in it for each chunk that is done.

    .prepare/lock            held by the run at work
    .prepare/plan.json       what is being made, of what
    .prepare/train.bin       (and val.bin) the tokens so far
    .prepare/journal.jsonl   [text: bytes, crc32], [train: bytes, crc32], [val: ...], repaired, unknown; a line a chunk
    .prepare/tokenizer/      as it will be published

A line is written after the tokens that it speaks of, and both are checked when the next run goes on: what kill -9 or a power
cut left beyond the last good line is cut off. So nothing needs to be flushed on the way.
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
"""Of plan.json and journal.jsonl, and of how text is cut into chunks: a run of another one starts afresh."""
SIDES = ("train.bin", "val.bin")
_BLOCK = 1 << 20


@contextmanager
def stage(output_dir: Path) -> Iterator[Path]:
    """The folder to work in, for us alone. It stays where it is; `remove` takes it away.

    `output_dir` is made where it is missing. Raises DataError where nothing can be written there, or another run is at
    work there.
    """
    folder = output_dir / STAGE
    try:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The run before us may have removed the folder while we waited at its door.
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
    """Forgets all work in the stage `folder`, which stays ours, as does what was saved of standard input."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("lock", STDIN):
            path.unlink()


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def read_plan(folder: Path) -> dict[str, Any] | None:
    """What an unfinished run of this version was making; None where there was none."""
    try:
        plan: dict[str, Any] = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return plan if plan.get("version") == VERSION else None


def write_plan(folder: Path, plan: dict[str, Any]) -> None:
    write_file(folder / "plan.part", json.dumps(plan | {"version": VERSION}, indent=1).encode())
    (folder / "plan.part").replace(folder / "plan.json")


class Changed(Exception):
    """The text is not the one that the journal speaks of."""


class Journal:
    """The two token files as far as they are whole, and the lines that say how far that is."""

    def __init__(self, folder: Path) -> None:
        self.done: list[dict[str, Any]] = []
        """A line a chunk that need not be encoded again."""
        self.repaired: Counter[int] = Counter()
        """Source -> places that were no UTF-8."""
        self.unknown = 0
        """Words that became <unk>."""
        self._hashes = [hashlib.sha256(), hashlib.sha256()]
        self.bytes = [0, 0]
        """Of train.bin and val.bin."""
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
        """Whether the chunk with this number needs no encoding. Raises Changed where it was another text then."""
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
        """Brings the files down to the disk. Returns their sha256."""
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
        """Whether both files go on with what `entry` says. Moves past it if so."""
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
    """All of it: a full disk may take a part and say so only at the next try."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
