"""A run directory on an object store (--run-dir s3://bucket/run). Each worker uses a local folder, its mirror, instead.

    RUN/config.yaml, tokenizer/, checkpoints/   as in a folder
    RUN/ledger.jsonl/0000000000000000, ...      parts, named by the byte at which they begin, since no store can append
    RUN/ledger.jsonl/notes/...                  lines of other workers than the first; the first of the next life adds them
    RUN/metrics.jsonl/0000000000000000, ...

The store has the truth. A mirror belongs to one process, begins with what the store has, and is
deleted with its process. Only the first worker of a world writes. An event is on the store when
`Ledger.write_durably` returns. A thread writes the metrics, never further behind than the reports
in a snapshot, so a kill loses none.
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

PART = 64 << 10  # bytes of the last part, which is written anew for each line
RETRY_SECONDS = 1.0
TRIES = 20  # tries to read a file that is being written
LEFT_OVER_SECONDS = 60.0
SMALL = (CONFIG, CLAIM, LEDGER, TOKENIZER)

_mirrors: dict[Path, "Mirror"] = {}  # by their folders


def here(run: Path, *more: str) -> Path:
    """The run directory as a folder of this machine: `run` itself, or for a URL its mirror.

    `more`: names of large files to fetch into the mirror as well.

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
    """The mirror that contains `path`, a folder or file; None if `path` is not in a mirror."""
    return _mirrors.get(path) or _mirrors.get(path.parent)


def shown(run: Path) -> str:
    """The name of the run directory for a person: its URL, if it is a mirror."""
    mirror = mirror_of(run)
    return mirror.url if mirror else str(run)


class Mirror:
    """A local folder that stands for a run directory on an object store.

    Args:
        url: URL of the run directory.
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
        """Name of the life in which this worker is the writer. In other lives its lines become notes."""
        self.fenced = False
        """Whether another job has taken the run directory, so that this one must not write any more."""
        self.parts: dict[str, list[int]] = {}  # file of lines to the bytes at which its parts begin
        self.notes: list[str] = []
        self.busy = threading.RLock()
        _mirrors[self.folder] = self

    @property
    def writes(self) -> bool:
        return bool(self.life) and not self.fenced

    def reopen(self) -> None:
        """Fetch all that the store has. From here on this worker only reads, until `begin_writing`."""
        self.life = ""
        self.pull(*SMALL, METRICS)

    def pull(self, *names: str) -> None:
        """Fetch these files or folders from the store."""
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
        """Become the writer in `life`. Adds the notes of others to the files, and tidies up after killed writers."""
        with self.busy:
            self.life, self.fenced = life, False
            with as_os_error(f"write {self.url}"):
                for name in (LEDGER, METRICS):
                    for start in sorted(set(self._starts(name)) - set(self.parts.get(name, [])), reverse=True):
                        self.files.rm_file(self._part(name, start))  # behind a gap that a kill left
            self.push_lines(LEDGER)
            with as_os_error(f"write {self.url}"):
                while self.notes:
                    self.files.rm_file(self.notes.pop())

    def put(self, *names: str) -> None:
        """Upload files or folders of the mirror, in this order."""
        with as_os_error(f"write {self.url}"):
            for name in names:
                path = self.folder / name
                for file in sorted(path.rglob("*"), reverse=True) if path.is_dir() else [path]:
                    if file.is_file():
                        relative = file.relative_to(self.folder).as_posix()
                        self.files.pipe_file(f"{self.root}/{relative}", file.read_bytes())

    def text(self, name: str) -> str:
        """The text of a file that is only on the store; "" if there is none."""
        try:
            with as_os_error(f"read {self.url}/{name}"):
                return str(self.files.cat_file(f"{self.root}/{name}").decode())
        except FileNotFoundError:
            return ""

    def write_text(self, name: str, text: str) -> None:
        """Write a file that is only on the store."""
        with as_os_error(f"write {self.url}/{name}"):
            self.files.pipe_file(f"{self.root}/{name}", text.encode())

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), as_os_error(f"delete {self.url}/{name}"):
            self.files.rm_file(f"{self.root}/{name}")

    def append(self, name: str, line: bytes) -> None:
        """Upload a line that was added to a file of the mirror. When this returns it is on the store, perhaps as a note."""
        if self.writes:
            self.push_lines(name)
            return
        note = f"{self.root}/{name}/notes/{time.time_ns():020d}-{secrets.token_hex(4)}"
        with as_os_error(f"write {self.url}/{name}"):
            self.files.pipe_file(note, line)
        self.notes.append(note)

    def cut(self, name: str, end: int) -> None:
        """Call it when a file of the mirror was cut to `end` bytes. The next push removes the rest from the store."""
        with self.busy, as_os_error(f"write {self.url}/{name}"):
            parts = self.parts.setdefault(name, [])
            while len(parts) > 1 and parts[-1] >= end:  # the last part first, so that a kill leaves no gap
                self.files.rm_file(self._part(name, parts[-1]))
                parts.pop()

    def push_lines(self, name: str, end: int | None = None) -> None:
        """Upload the mirror's file up to byte `end` (None: all of it)."""
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
            # Notes are read before the parts: a note that is deleted meanwhile is already in a part.
            with contextlib.suppress(FileNotFoundError):  # the writer has deleted it since it was listed
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
        del content[content.rfind(b"\n") + 1 :]  # a kill may have left half of a line that spans two parts
        self.parts[name] = [start for start in kept if start == 0 or start < len(content)]
        for line in notes:
            content += b"" if line in content else line
        path = self.folder / name
        if not content:
            path.unlink(missing_ok=True)
            return
        _replace(path, bytes(content))
        # If the store does not tell when the file changed, the pause before this life is counted from now.
        with contextlib.suppress(NotImplementedError, AttributeError):
            if kept:
                written = self.files.modified(self._part(name, kept[-1])).timestamp()
                os.utime(path, (written, written))

    def _pull_folder(self, name: str) -> None:
        found = map(str, self.files.find(f"{self.root}/{name}"))  # s3fs may list a folder that is just being made
        files = [path for path in found if f"{self.root}/{name}/" in path]
        relative = {path: path[path.rindex(f"{self.root}/{name}/") + len(self.root) + 1 :] for path in files}
        if f"{name}/meta.json" not in relative.values():  # it is written last
            return
        for path, content in self._read(files).items():
            target = self.folder / relative[path]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

    def _read(self, paths: list[str]) -> dict[str, bytes]:
        """The content of many files, in one request if the store can do that."""
        return self.files.cat(paths) if len(paths) > 1 else {path: self.files.cat_file(path) for path in paths}


class Follower:
    """Uploads a growing file of lines from a thread. Makes the writer wait if the store is too far behind.

    If the store does not answer, the writer does not wait: the lines are uploaded when it answers
    again.

    Args:
        lag: most lines that may be missing on the store.
    """

    def __init__(self, mirror: Mirror, name: str, lag: int) -> None:
        self.mirror, self.name, self.lag = mirror, name, lag
        self.end = self.written = self.sent = 0  # bytes; lines
        self.away = self.closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._follow, name="follower", daemon=True)
        self.thread.start()

    def grown(self, end: int) -> None:
        """Call it after each new line. `end`: bytes of whole lines in the file."""
        with self.changed:
            self.end, self.written = end, self.written + 1
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.written - self.sent <= self.lag or self.away)

    def close(self) -> None:
        """Wait until the store has all lines. If it does not answer, try once more."""
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
    """Delete the mirrors that killed processes of this user have left."""
    left: Iterable[Path] = Path(tempfile.gettempdir()).glob(f"elastic-gpt-run-{os.getuid()}-*")
    for folder in left:
        with contextlib.suppress(OSError), (folder / ".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
            if time.time() - folder.stat().st_mtime > LEFT_OVER_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
