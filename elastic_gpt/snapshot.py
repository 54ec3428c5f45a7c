"""Snapshots: copies of the state in a node's shared memory, which outlive the worker process.

Two buffers take turns, so one of them is whole at any moment. A snapshot is a file `N.tensors`,
written in place, and its header `N.json`. The header is removed before the tensors are overwritten.
It is renamed into place again when their checksum is known.

A GPU copies its state beside the next step, whose passes only read it: `goes_before` has the update come after the copy.
"""

import contextlib
import fcntl
import glob
import json
import os
import shutil
import stat
import sys
import time
import zlib
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from elastic_gpt import devices
from elastic_gpt.ledger import strict_json

ALIGNMENT = 64  # bytes; tensors begin at multiples of it
LEFT_OVER_SECONDS = 3600.0


class SnapshotError(OSError):
    """This node cannot keep snapshots. The run goes on without them, and may lose more steps."""


@dataclass(frozen=True)
class Snapshot:
    """A whole snapshot in one of the buffers."""

    header: Path
    step: int
    life: int
    """Number of the life in which it was made."""
    name: str
    """Name of that life."""
    history_bytes: int
    """Length of metrics.jsonl then. If the file is shorter now, the run directory was rolled back."""
    reports: list[dict[str, Any]]
    crc32: int
    """Checksum of the buffer."""


def sweep(root: Path) -> None:
    """Delete what killed jobs left in shared memory: folders that no process uses and that are older than an hour.

    Within the hour, a job that was killed can be resumed from its memory.
    """
    for tensors in _there(root, "*/*/0.tensors"):
        with contextlib.suppress(OSError), tensors.open("rb") as file:  # another may sweep as well
            newest = max((path.stat().st_mtime for path in tensors.parent.iterdir()), default=time.time())
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its worker lives
            if time.time() - newest > LEFT_OVER_SECONDS:
                shutil.rmtree(tensors.parent, ignore_errors=True)
                tensors.parent.parent.rmdir()


class Snapshots:
    """The snapshots of one node in one run.

    Args:
        folder: the run's folder in shared memory; each node has a folder in it.
        node: name of this node.
        identity: identity of the run; snapshots of another run or another layout are ignored.
        tensors: the live state. Its names, shapes and dtypes define the layout.
        name: name of this life.
        history: path of the run's metrics.jsonl.
        changed_by_forward: names of the tensors that a forward pass may change. Updates alone change the others.

    Raises:
        SnapshotError: if shared memory cannot hold two buffers.
    """

    def __init__(
        self,
        folder: Path,
        node: str,
        identity: str,
        tensors: dict[str, torch.Tensor],
        *,
        name: str = "",
        history: Path | None = None,
        changed_by_forward: Collection[str] = (),
    ) -> None:
        self.run, self.folder, self.identity = folder, folder / node, identity
        self.name, self.history, self.changed_by_forward = name, history, changed_by_forward
        self.held: list[IO[bytes]] = []
        self.places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, tensor in tensors.items():
            self.places[name] = (end, end + tensor.nbytes)
            end = -(-(end + tensor.nbytes) // ALIGNMENT) * ALIGNMENT
        self.bytes = end
        layout = json.dumps([(name, str(t.dtype), list(t.shape)) for name, t in tensors.items()])
        self.identity += f"/{zlib.crc32(layout.encode()):08x}"
        try:
            folder.parent.mkdir(mode=0o700, exist_ok=True)
            _own(folder.parent)
            sweep(folder.parent)
            self.folder.mkdir(parents=True, exist_ok=True)
            self.buffers = [self._reserve(self.folder / f"{number}.tensors") for number in (0, 1)]
        except SnapshotError:
            raise
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise SnapshotError(
                f"no snapshots on this node: {folder.parent} cannot hold two buffers of {end / 1e6:.1f} MB ({error.strerror});"
                " enlarge /dev/shm (in a pod: a Memory volume mounted there). Until then a lost worker costs the steps"
                " since the last checkpoint"
            ) from error
        self.unlocks: list[Callable[[], object]] = []
        self.device = self._lock_pages(tensors)  # the one that copies beside its work, if any
        self.copy: devices.SideCopy | None = None  # one before which the state must not change
        self.turn = 0
        self.step = -1  # step of the newest snapshot that this process has saved
        self.saved_in = ""  # name of the life in which that was
        self.checksummer = ThreadPoolExecutor(1, "snapshot")
        self.pending: Future[None] | None = None

    def newest(self, valid: Callable[[Snapshot], bool]) -> Snapshot | None:
        """The newest whole snapshot of the run in this machine's memory, even if its node has gone.

        Args:
            valid: tells whether a snapshot is part of the run's history, and not abandoned.
        """
        found = [snapshot for header in _there(self.run, "*/[01].json") if (snapshot := self._read(header))]
        found = [snapshot for snapshot in found if valid(snapshot)]
        found.sort(key=lambda snapshot: (snapshot.step, snapshot.life), reverse=True)
        newest = next(filter(_whole, found), None)
        if newest and newest.header.parent == self.folder:
            self.turn = 1 - int(newest.header.stem)  # so that the other buffer is overwritten first
        return newest

    @torch.no_grad()
    def save(self, step: int, life: int, tensors: dict[str, torch.Tensor], reports: list[dict[str, Any]]) -> None:
        """Copy the state. A thread computes the checksum and commits, while training goes on.

        A GPU has only begun to copy then: call `goes_before` before the state is changed.
        """
        self.wait()
        number = self.turn
        self._header(number).unlink(missing_ok=True)
        views = self._views(self.buffers[number], tensors)
        pairs = {name: (views[name], tensor) for name, tensor in tensors.items()}
        if self.device is None:
            for host, tensor in pairs.values():
                host.copy_(tensor)
        else:
            for name in self.changed_by_forward:  # in the order of the device's work, so before the next forward pass
                host, tensor = pairs.pop(name)
                host.copy_(tensor, non_blocking=True)
            self.copy = devices.SideCopy(pairs.values(), self.device)
        header = {
            "identity": self.identity,
            "step": step,
            "life": life,
            "name": self.name,
            "history_bytes": _length(self.history),
            "reports": list(reports),
        }
        self.pending = self.checksummer.submit(self._commit, number, header, self.copy)
        self.turn, self.step, self.saved_in = 1 - number, step, self.name

    def begin_life(self, name: str, known: Collection[str]) -> None:
        """From now on snapshots are of the life `name`; `known` are those before it.

        One that was saved in another life counts for nobody: its rank 0 died before it had written it down. It is saved anew,
        in the same buffer.
        """
        if self.step >= 0 and self.saved_in not in known:
            self.step, self.turn = -1, 1 - self.turn
        self.name = name

    def goes_before(self) -> None:
        """Have a copy that is on its way end before the device does what is queued from now on. The host does not wait."""
        copy, self.copy = self.copy, None
        if copy:
            copy.goes_before()

    def wait(self) -> None:
        """Wait until the newest snapshot is committed."""
        pending, self.pending = self.pending, None
        try:
            if pending:
                self.copy = None
                pending.result()
        except (OSError, RuntimeError) as error:  # a device that is lost raises the latter
            # Without a header it does not count; the one before is still whole.
            print(f"warning: a snapshot could not be kept: {error}", file=sys.stderr, flush=True)

    @torch.no_grad()
    def load(self, snapshot: Snapshot, tensors: dict[str, torch.Tensor]) -> None:
        """Copy a snapshot into the live state."""
        buffer = np.memmap(snapshot.header.with_suffix(".tensors"), dtype=np.uint8, mode="c")
        for name, saved in self._views(buffer, tensors).items():
            tensors[name].copy_(saved)

    def drop_others(self, nodes: list[str]) -> None:
        """Delete the snapshots of nodes of this run that have gone.

        Args:
            nodes: names of the nodes that are still there.
        """
        for folder in _there(self.run, "*"):
            if folder.name not in nodes:
                shutil.rmtree(folder, ignore_errors=True)

    def discard(self) -> None:
        """Delete this node's snapshots at the end of the run. None may be on its way."""
        for unlock in self.unlocks:
            unlock()
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # the last node on this machine can remove the run's folder
            self.run.rmdir()

    def _reserve(self, path: Path) -> np.memmap:
        self.held.append(path.open("ab"))  # kept open: its lock tells `sweep` that a process uses it
        fcntl.flock(self.held[-1], fcntl.LOCK_SH)
        with path.open("ab") as file:
            if os.fstat(file.fileno()).st_size != self.bytes:
                file.truncate(0)
                # Space is reserved now, since a memory-mapped write to a full /dev/shm is a SIGBUS and not an error.
                os.posix_fallocate(file.fileno(), 0, self.bytes)
        return np.memmap(path, dtype=np.uint8, mode="r+")

    def _lock_pages(self, tensors: dict[str, torch.Tensor]) -> torch.device | None:
        """Lock the pages of both buffers for the device of the state. None if it copies at once, or cannot do otherwise."""
        device = next((tensor.device for tensor in tensors.values() if devices.works_on(tensor.device)), None)
        if device is None:
            return None
        try:
            for buffer in self.buffers:
                self.unlocks.append(devices.lock_pages(buffer, device))
        except RuntimeError as error:
            for unlock in self.unlocks:
                unlock()
            print(
                f"warning: the memory for snapshots cannot be page-locked ({error}): training waits while one is copied",
                file=sys.stderr,
                flush=True,
            )
            return None
        return device

    def _views(self, buffer: np.memmap, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a state as they lie in a buffer."""
        whole = torch.from_numpy(buffer)
        places = {name: whole[slice(*self.places[name])] for name in tensors}
        return {name: place.view(tensors[name].dtype).view(tensors[name].shape) for name, place in places.items()}

    def _read(self, header: Path) -> Snapshot | None:
        """The snapshot that a header describes; None if it is not of this run."""
        try:
            content = json.loads(header.read_text())
            if content.pop("identity") != self.identity:
                return None
            return Snapshot(header, **content)
        except (OSError, ValueError, KeyError, TypeError):  # another file, or just deleted
            return None

    def _commit(self, number: int, header: dict[str, Any], copy: devices.SideCopy | None) -> None:
        if copy:
            copy.wait()
        aside = self._header(number).with_suffix(".partial")
        aside.write_text(strict_json(header | {"crc32": zlib.crc32(self.buffers[number].data)}))
        aside.rename(self._header(number))

    def _header(self, number: int) -> Path:
        return self.folder / f"{number}.json"


def _there(folder: Path, pattern: str) -> list[Path]:
    """Paths that match. Unlike Path.glob, it does not fail if another process deletes a folder meanwhile."""
    return [folder / found for found in glob.glob(pattern, root_dir=folder)]  # noqa: PTH207


def _own(folder: Path) -> None:
    """Make `folder`, or check that it is this user's. In /dev/shm, the owner of a folder could exchange what is in it."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise SnapshotError(
            f"no snapshots on this node: {folder} is not this user's alone (a folder, mode 700): remove it."
            " Until then a lost worker costs the steps since the last checkpoint"
        )


def _length(path: Path | None) -> int:
    """Bytes of a file; 0 if not known. Opens the file, which makes a network file system look again."""
    if path is not None:
        with contextlib.suppress(OSError), path.open("rb") as file:
            return file.seek(0, os.SEEK_END)
    return 0


def _whole(snapshot: Snapshot) -> bool:
    try:
        tensors = np.memmap(snapshot.header.with_suffix(".tensors"), dtype=np.uint8, mode="r")
    except (OSError, ValueError):
        return False
    return snapshot.crc32 == zlib.crc32(tensors.data)
