"""The state in a node's shared memory: it outlives the worker process, and costs a copy to make.

Two buffers take turns, so one is whole at any moment. A snapshot is the file `N.tensors`, filled in place, and `N.json`,
which makes it one: the json is removed before the tensors are touched and appears, by a rename, once their checksum is known.
"""

import json
import os
import shutil
import tempfile
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ALIGNMENT = 64  # bytes; a tensor's place in the buffer


class SnapshotError(OSError):
    """No snapshots can be kept on this node; the run goes on with a smaller guarantee."""


@dataclass(frozen=True)
class Snapshot:
    """A whole snapshot in one of the buffers."""

    buffer: int
    step: int
    reports: list[dict[str, float]]


def shared_memory() -> Path:
    """The folder of all snapshots of this user on this machine."""
    root = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    return root / f"elastic-gpt-{os.getuid()}"


class Snapshots:
    """The snapshots of one node in one run.

    Args:
        folder: in shared memory, this node's and run's own.
        identity: of run and configuration; snapshots of another identity are not seen.
        tensors: the live state. Its names, shapes and dtypes fix the layout.

    Raises:
        SnapshotError: if shared memory cannot hold two buffers.
    """

    def __init__(self, folder: Path, identity: str, tensors: dict[str, torch.Tensor]) -> None:
        self.folder, self.identity = folder, identity
        self.places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, tensor in tensors.items():
            self.places[name] = (end, end + tensor.nbytes)
            end = -(-(end + tensor.nbytes) // ALIGNMENT) * ALIGNMENT
        self.bytes = end
        layout = json.dumps([(name, str(t.dtype), list(t.shape)) for name, t in tensors.items()])
        self.identity += f"/{zlib.crc32(layout.encode()):08x}"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self.buffers = [self._reserve(folder / f"{number}.tensors") for number in (0, 1)]
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise SnapshotError(
                f"no snapshots on this node: {folder.parent} cannot hold two buffers of {end / 1e6:.0f} MB ({error.strerror});"
                " enlarge /dev/shm (in a pod: a Memory volume mounted there). Until then a lost worker costs the steps"
                " since the last checkpoint"
            ) from error
        self.turn = 0
        self.checksummer = ThreadPoolExecutor(1, "snapshot")
        self.pending: Future[None] | None = None

    def newest(self) -> Snapshot | None:
        """The newest whole snapshot here, its checksum verified."""
        found = []
        for number in (0, 1):
            try:
                header = json.loads(self._header(number).read_text())
            except (OSError, ValueError):
                continue
            if header["identity"] == self.identity and header["crc32"] == self._checksum(number):
                found.append(Snapshot(number, header["step"], header["reports"]))
        best = max(found, key=lambda snapshot: snapshot.step, default=None)
        self.turn = 1 - best.buffer if best else 0
        return best

    @torch.no_grad()
    def save(self, step: int, tensors: dict[str, torch.Tensor], reports: list[dict[str, float]]) -> None:
        """Copy the state; the checksum and the commit follow in a thread while training goes on."""
        self.wait()
        number = self.turn
        self._header(number).unlink(missing_ok=True)
        for name, tensor in tensors.items():
            self._view(number, name, tensor).copy_(tensor)
        self.pending = self.checksummer.submit(self._commit, number, step, list(reports))
        self.turn = 1 - number

    def wait(self) -> None:
        """Until the newest snapshot is committed."""
        if self.pending:
            self.pending.result()
            self.pending = None

    @torch.no_grad()
    def load(self, snapshot: Snapshot, tensors: dict[str, torch.Tensor]) -> None:
        """Copy a snapshot into the live state."""
        for name, tensor in tensors.items():
            tensor.copy_(self._view(snapshot.buffer, name, tensor))

    def discard(self) -> None:
        """Free the shared memory of all nodes of the run on this machine: the run is over."""
        self.wait()
        shutil.rmtree(self.folder.parent, ignore_errors=True)

    def _reserve(self, path: Path) -> np.memmap:
        with path.open("ab") as file:
            if os.fstat(file.fileno()).st_size != self.bytes:
                file.truncate(0)
                # Reserved now: a memory-mapped write to a full /dev/shm would be a SIGBUS, not an error.
                os.posix_fallocate(file.fileno(), 0, self.bytes)
        return np.memmap(path, dtype=np.uint8, mode="r+")

    def _view(self, number: int, name: str, like: torch.Tensor) -> torch.Tensor:
        start, end = self.places[name]
        return torch.from_numpy(self.buffers[number][start:end]).view(like.dtype).view(like.shape)

    def _checksum(self, number: int) -> int:
        return zlib.crc32(self.buffers[number].data)

    def _commit(self, number: int, step: int, reports: list[dict[str, float]]) -> None:
        header = {"identity": self.identity, "step": step, "crc32": self._checksum(number), "reports": reports}
        aside = self._header(number).with_suffix(".partial")
        aside.write_text(json.dumps(header))
        aside.rename(self._header(number))

    def _header(self, number: int) -> Path:
        return self.folder / f"{number}.json"
