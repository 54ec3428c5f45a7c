"""Which run a state belongs to. A run belongs to its directory; a copy of the directory is another run (law 10).

A run has an id, which is written when its directory is made, together with what identifies that
directory in the file system. A copy (`cp -r`, a restored backup) is another directory: it gets an
id of its own, and never the memory of the original. Each life of a run has a random name, which is
in all its snapshots and checkpoints. A state of a life that the ledger does not know is not this
run's. That also finds directories that were rolled back, which keep their id.
"""

import contextlib
import ctypes
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic_gpt.contract import CHECKPOINTS
from elastic_gpt.mirror import mirror_of


@dataclass(frozen=True)
class Run:
    """What the workers have to know about their run."""

    run_id: str
    life: int
    """Number of this life."""
    branches: list[tuple[int, int]]
    """Number of each earlier life, and the step at which it began."""
    saved: tuple[int, str] | None = None
    """Step and place of the last checkpoint that the ledger knows of."""
    name: str = ""
    """Random name of this life, which is in all that it saves."""
    lives: Mapping[str, int] = field(default_factory=dict)
    """Name to number of each earlier life."""
    history_bytes: int = 0
    """Length of metrics.jsonl when this life began."""
    ancestors: tuple[str, ...] = ()
    """Ids of the runs that this one was copied from."""
    own: str = CHECKPOINTS
    """The folder for checkpoints in the run directory."""
    left: frozenset[str] = frozenset()
    """Places with checkpoints of the runs that this one was copied from."""
    note: str = ""
    """A line for a person if this directory is a copy; else ""."""
    continues: bool = False
    """Whether the life before belonged to the same job. If not, a person has started a new job."""

    def valid(self, life: int, step: int) -> bool:
        """Whether the state after `step` of `life` is part of the run's history, and not abandoned by a later life."""
        return all(step <= began for later, began in self.branches if later > life)

    def refusal(self, manifest: Mapping[str, Any], place: str) -> str | None:
        """One line that says why a checkpoint in `place` is not this run's, and the cure; None if it may be.

        Raises:
            KeyError: if the manifest does not name its run.
        """
        owner, life, step = manifest["run_id"], manifest.get("life"), manifest["step"]
        if owner != self.run_id and owner not in self.ancestors and place == self.own:
            return (
                f"{place} holds step {step} of run {owner}, which this run directory's ledger does not know: files of two runs"
                f" were put together: delete {place}/step_{step:08d} if nobody needs it"
            )
        if owner != self.run_id and owner not in self.ancestors:
            return (
                f"{place} holds checkpoints of another run ({owner}): give this one a --checkpoint.dir of its own,"
                " or go on in the other's --run-dir"
            )
        if owner != self.run_id and place in self.left:
            return (
                f"{place} holds the checkpoints of the run that this one was copied from ({owner}), and two cannot share"
                f" them: {self.cure_of_a_copy(place, step)}"
            )
        # The ledger may have been written by hand after the loss of the run directory (see docs/DESIGN.md, State).
        begins = self.branches[0][1] if self.branches else step
        if life and step > begins and life not in self.lives and life != self.name:
            return (
                f"{place} holds step {step} of a life that this run's ledger does not know ({life}): another copy of the"
                " run goes on there, or this run directory was rolled back: take another --checkpoint.dir and copy there"
                f" what was saved before, or delete {place}/step_{step:08d} if nobody needs it"
            )
        return None

    def cure_of_a_copy(self, place: str, step: int) -> str:
        """What to do so that a copy gets checkpoints of its own."""
        copy = f"mkdir -p {self.own} && cp -r {place}/step_{step:08d} {self.own}/"
        return f"leave --checkpoint.dir out, and copy the checkpoint to go on from there ({copy})"


def directory(path: Path) -> dict[str, Any]:
    """What identifies a folder in the file system: it survives renaming, and differs for a copy.

    For a run directory on an object store that is its URL.
    """
    if mirror := mirror_of(path):
        return {"path": mirror.url, "inode": mirror.url, "device": None, "birth": None, "machine": machine()}
    status = path.stat()
    return {
        "path": str(path.resolve()),
        "inode": status.st_ino,
        "device": status.st_dev,
        "birth": _birth(path),
        "machine": machine(),
    }


def same_directory(here: Mapping[str, Any], recorded: Mapping[str, Any]) -> bool:
    """Whether two descriptions are of the same folder. Device numbers only count on one machine, until it restarts."""
    for part in ("inode", "birth", *(["device"] if here["machine"] == recorded["machine"] else [])):
        if here[part] is not None and recorded[part] is not None and here[part] != recorded[part]:
            return False
    return True


def machine() -> str:
    """Identifies where process ids are unique: this machine since its start, and the container on it."""
    return _space("pid")


def network() -> str:
    """Identifies where a loopback address is the same place: the network namespace, which a pod's containers share."""
    return _space("net")


def _space(namespace: str) -> str:
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path(f'/proc/self/ns/{namespace}').stat().st_ino}"
    return socket.gethostname()


def _birth(path: Path) -> float | None:
    """When a folder was made, seconds since 1970; None if not known. (Called by ctypes: Python has no statx on Linux.)"""
    buffer = ctypes.create_string_buffer(256)
    at_fdcwd, statx_btime = -100, 0x800
    try:
        failed = ctypes.CDLL(None).statx(at_fdcwd, str(path).encode(), 0, statx_btime, buffer)
    except AttributeError:  # not Linux
        return None
    if failed or not struct.unpack_from("I", buffer, 0)[0] & statx_btime:
        return None
    seconds, nanoseconds = struct.unpack_from("qI", buffer, 80)
    return float(seconds) + nanoseconds / 1e9
