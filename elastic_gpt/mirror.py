"""A run directory on an object store (--run-dir s3://bucket/run): each worker has a folder that stands for it, its mirror.

    RUN/config.yaml, tokenizer/, checkpoints/   as in a folder
    RUN/ledger.jsonl/0000000000000000, ...      an object store appends to nothing: parts, each named by where it begins
    RUN/ledger.jsonl/notes/...                  what other workers than the first saw, until the next life's first takes it in
    RUN/metrics.jsonl/0000000000000000, ...

The store is the truth: a mirror is this process's alone, begins with what the store has, and goes with its process. The first
worker of a world alone writes. An event is on the store when `Ledger.write_durably` returns. Metrics follow from a thread,
never further behind than the reports that a snapshot carries, so a kill loses none.
"""

import atexit
import contextlib
import fcntl
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from elastic_gpt.contract import CLAIM, CONFIG, LEDGER, METRICS, TOKENIZER
from elastic_gpt.storage import Unreachable, as_os_error, open_url, url_of

PART = 64 << 10  # bytes of an object that is written again with each line
RETRY_SECONDS = 1.0
TRIES = 20  # to read what is being written
LEFT_OVER_SECONDS = 60.0
SMALL = (CONFIG, CLAIM, LEDGER, TOKENIZER)

_mirrors: dict[Path, "Mirror"] = {}  # by their folders


def here(run: Path, *more: str) -> Path:
    """The run directory as a folder of this machine: `run` itself, or for a URL its mirror, with `more` files than the small.

    Raises:
        ValueError: if nothing installed knows the URL's protocol.
        Unreachable: if the store does not answer.
    """
    url = url_of(run)
    if url is None:
        return run
    mirror = next((one for one in _mirrors.values() if one.url == url), None) or Mirror(url)
    mirror.pull(*SMALL, *more)
    return mirror.folder


def mirror_of(path: Path) -> "Mirror | None":
    """The mirror that a run directory, or a file in it, is of; None for a folder that stands for itself."""
    return _mirrors.get(path) or _mirrors.get(path.parent)


def shown(run: Path) -> str:
    """What a person knows the run directory as."""
    mirror = mirror_of(run)
    return mirror.url if mirror else str(run)


class Mirror:
    """A folder that stands for a run directory on an object store.

    Args:
        url: of the run directory.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.files, self.root = open_url(self.url, "run_dir")
        _sweep()
        self.folder = Path(tempfile.mkdtemp(prefix=f"elastic-gpt-run-{os.getuid()}-"))
        self.lock: IO[bytes] = (self.folder / ".lock").open("wb")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self.life = ""
        """Name of the life in which this worker is the one that writes; in others what it has to say goes as a note."""
        self.fenced = False
        """Whether another job has taken the run directory meanwhile: this one writes no more."""
        self.parts: dict[str, list[int]] = {}  # of each file of lines: where its parts begin
        self.notes: list[str] = []
        self.busy = threading.RLock()
        _mirrors[self.folder] = self

    @property
    def writes(self) -> bool:
        return bool(self.life) and not self.fenced

    def reopen(self) -> None:
        """Have all that the store has. From here on this worker is a reader, until `begin_writing`."""
        self.life = ""
        self.pull(*SMALL, METRICS)

    def pull(self, *names: str) -> None:
        """Have what the store has of these."""
        with self.busy, as_os_error(f"read {self.url}"):
            for name in names:
                if name in (LEDGER, METRICS):
                    self._pull_lines(name)
                elif name == TOKENIZER:
                    self._pull_folder(name)
                else:
                    try:
                        _replace(self.folder / name, self.files.cat_file(f"{self.root}/{name}"))
                    except FileNotFoundError:
                        (self.folder / name).unlink(missing_ok=True)

    def begin_writing(self, life: str) -> None:
        """This worker is the first one in `life`: what others left of lines and notes is put in order."""
        with self.busy:
            self.life, self.fenced = life, False
            with as_os_error(f"write {self.url}"):
                for name in (LEDGER, METRICS):
                    for start in sorted(set(self._starts(name)) - set(self.parts.get(name, [])), reverse=True):
                        self.files.rm_file(self._part(name, start))  # past a gap, which a kill left
            self.push_lines(LEDGER)
            with as_os_error(f"write {self.url}"):
                while self.notes:
                    self.files.rm_file(self.notes.pop())

    def put(self, *names: str) -> None:
        """Files of the mirror, or all files of a folder in it, to the store; the last one is there last."""
        with as_os_error(f"write {self.url}"):
            for name in names:
                path = self.folder / name
                for file in sorted(path.rglob("*"), reverse=True) if path.is_dir() else [path]:
                    if file.is_file():
                        relative = file.relative_to(self.folder).as_posix()
                        self.files.pipe_file(f"{self.root}/{relative}", file.read_bytes())

    def text(self, name: str) -> str:
        """Of a file that the store alone has; empty where it has none."""
        try:
            with as_os_error(f"read {self.url}/{name}"):
                return str(self.files.cat_file(f"{self.root}/{name}").decode())
        except FileNotFoundError:
            return ""

    def write_text(self, name: str, text: str) -> None:
        """Of a file that the store alone has."""
        with as_os_error(f"write {self.url}/{name}"):
            self.files.pipe_file(f"{self.root}/{name}", text.encode())

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), as_os_error(f"delete {self.url}/{name}"):
            self.files.rm_file(f"{self.root}/{name}")

    def append(self, name: str, line: bytes) -> None:
        """A line that the mirror's file has got: on the store when this returns, in the file or as a note."""
        if self.writes:
            self.push_lines(name)
            return
        note = f"{self.root}/{name}/notes/{time.time_ns():020d}-{secrets.token_hex(4)}"
        with as_os_error(f"write {self.url}/{name}"):
            self.files.pipe_file(note, line)
        self.notes.append(note)

    def cut(self, name: str, end: int) -> None:
        """The mirror's file was cut at `end` bytes: nothing past it stays on the store once something is pushed."""
        with self.busy, as_os_error(f"write {self.url}/{name}"):
            parts = self.parts.setdefault(name, [])
            while len(parts) > 1 and parts[-1] >= end:  # the last first, so that a kill leaves no gap
                self.files.rm_file(self._part(name, parts[-1]))
                parts.pop()

    def push_lines(self, name: str, end: int | None = None) -> None:
        """Have the store hold the mirror's file up to `end` bytes (all of it)."""
        with self.busy:
            if not self.writes or not (self.folder / name).exists():
                return
            parts = self.parts.setdefault(name, [])
            start = parts[-1] if parts else 0
            with (self.folder / name).open("rb") as file:
                file.seek(start)
                content = file.read(-1 if end is None else end - start)
            with as_os_error(f"write {self.url}/{name}"):
                while True:
                    self.files.pipe_file(self._part(name, start), content[:PART])
                    if start not in parts:
                        parts.append(start)
                    start, content = start + PART, content[PART:]
                    if not content:
                        break

    def _part(self, name: str, start: int) -> str:
        return f"{self.root}/{name}/{start:016d}"

    def _starts(self, name: str) -> list[int]:
        return sorted(int(base) for base in map(_base, self._list(name)) if base.isdigit())

    def _list(self, name: str) -> list[str]:
        try:
            return [str(path) for path in self.files.ls(f"{self.root}/{name}", detail=False)]
        except FileNotFoundError:
            return []

    def _pull_lines(self, name: str) -> None:
        for _ in range(TRIES):
            # Notes first: what is taken out of them is in a part before.
            with contextlib.suppress(FileNotFoundError):  # taken in by the writer, or cut, since they were listed
                notes = sorted(self._list(f"{name}/notes"))
                lines = self._read(notes).values()
                starts = self._starts(name)
                self._take_lines(name, starts, self._read([self._part(name, start) for start in starts]), lines)
                if name == LEDGER:
                    self.notes = notes
                return
        raise Unreachable(f"{self.url}/{name} changes faster than it can be read")

    def _take_lines(self, name: str, starts: list[int], found: dict[str, bytes], notes: Iterable[bytes]) -> None:
        content, kept = bytearray(), []
        for start in starts:
            if start > len(content):
                break
            content[start:] = found[self._part(name, start)]
            kept.append(start)
        del content[content.rfind(b"\n") + 1 :]  # of a line over two parts a kill may have left half
        self.parts[name] = [start for start in kept if start == 0 or start < len(content)]
        for line in notes:
            content += b"" if line in content else line
        path = self.folder / name
        if not content:
            path.unlink(missing_ok=True)
            return
        _replace(path, bytes(content))
        # Of a store that does not say when, the pause before a life is counted from now.
        with contextlib.suppress(NotImplementedError, AttributeError):
            if kept:
                written = self.files.modified(self._part(name, kept[-1])).timestamp()
                os.utime(path, (written, written))

    def _pull_folder(self, name: str) -> None:
        found = map(str, self.files.find(f"{self.root}/{name}"))  # s3fs may name a folder that is just being made
        files = [path for path in found if f"{self.root}/{name}/" in path]
        relative = {path: path[path.rindex(f"{self.root}/{name}/") + len(self.root) + 1 :] for path in files}
        if f"{name}/meta.json" not in relative.values():  # it is written last
            return
        for path, content in self._read(files).items():
            target = self.folder / relative[path]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

    def _read(self, paths: list[str]) -> dict[str, bytes]:
        """Of many files the content, in one go where the store can."""
        return self.files.cat(paths) if len(paths) > 1 else {path: self.files.cat_file(path) for path in paths}


class Follower:
    """Has the store follow a file of lines as it grows, from a thread, and holds up who writes when it is too far behind.

    A store that does not answer holds up nobody: the lines stay here, and it gets them when it is back.

    Args:
        lag: lines that may be missing on the store.
    """

    def __init__(self, mirror: Mirror, name: str, lag: int) -> None:
        self.mirror, self.name, self.lag = mirror, name, lag
        self.end = self.written = self.sent = 0  # bytes; lines
        self.away = self.closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._follow, name="follower", daemon=True)
        self.thread.start()

    def grown(self, end: int) -> None:
        """Another line is in the mirror's file, which has `end` bytes of whole lines."""
        with self.changed:
            self.end, self.written = end, self.written + 1
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.written - self.sent <= self.lag or self.away)

    def close(self) -> None:
        """Wait for the store to have all of it; a store that is away is asked once more."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.thread.join()
        if self.sent < self.written:
            missing = self.written - self.sent
            print(f"warning: {self.mirror.url}/{self.name} lacks {missing} lines", file=sys.stderr, flush=True)

    def _follow(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.written > self.sent or self.closed)
                if self.written == self.sent:
                    return
                end, written, last = self.end, self.written, self.closed
            try:
                self.mirror.push_lines(self.name, end)
            except OSError as error:
                if last:
                    return
                if not self.away:
                    print(f"WARNING: {error}; training goes on, and it is tried again", file=sys.stderr, flush=True)
                with self.changed:
                    self.away = True
                    self.changed.notify_all()
                    self.changed.wait_for(lambda: self.closed, RETRY_SECONDS)
                continue
            with self.changed:
                self.sent, self.away = written, False
                self.changed.notify_all()


def _base(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.new")
    aside.write_bytes(content)
    aside.replace(path)


def _sweep() -> None:
    """Remove the mirrors of this user's processes that were killed."""
    left: Iterable[Path] = Path(tempfile.gettempdir()).glob(f"elastic-gpt-run-{os.getuid()}-*")
    for folder in left:
        with contextlib.suppress(OSError), (folder / ".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its process lives
            if time.time() - folder.stat().st_mtime > LEFT_OVER_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
