"""Whose a state is: a run is its directory's, and its identity does not travel with a copy (law 10).

A run has an id, written when its directory is made, together with what the file system says of that directory. A directory
that is another one (`cp -r`, a restored backup) gets an id of its own, and its memory is its own from then on. Each life of a
run has a random name, which its snapshots and checkpoints carry: what a life made that this run's ledger does not know is not
this run's, also where a directory was rolled back under the same id.
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
    """What the workers have to know of the run they are in."""

    run_id: str
    life: int
    """Number of this life."""
    branches: list[tuple[int, int]]
    """Life and step at which each earlier life began."""
    saved: tuple[int, str] | None = None
    """Step and place of the last checkpoint that the ledger knows of."""
    name: str = ""
    """Of this life: random, in all that it saves."""
    lives: Mapping[str, int] = field(default_factory=dict)
    """Names of the earlier lives, and their numbers."""
    history_bytes: int = 0
    """Length of metrics.jsonl when this life began."""
    ancestors: tuple[str, ...] = ()
    """Ids of the runs that this one was copied from."""
    own: str = CHECKPOINTS
    """The folder of checkpoints in its directory."""
    left: frozenset[str] = frozenset()
    """Places of checkpoints that stayed with those."""
    note: str = ""
    """For who starts the job: that this directory is found to be a copy."""
    continues: bool = False
    """Whether the job that this life is of had the life before, too; else somebody has started it."""

    def valid(self, life: int, step: int) -> bool:
        """Whether the state after `step` of `life` is in the run's history, not in an end that a later life abandoned."""
        return all(step <= began for later, began in self.branches if later > life)

    def refusal(self, manifest: Mapping[str, Any], place: str) -> str | None:
        """Why a checkpoint in `place` cannot be this run's, in a line with the cure; None if it may be.

        Raises:
            KeyError: for a manifest that does not say whose it is.
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
        # A ledger that was made by hand for a lost one begins where its first life did.
        begins = self.branches[0][1] if self.branches else step
        if life and step > begins and life not in self.lives and life != self.name:
            return (
                f"{place} holds step {step} of a life that this run's ledger does not know ({life}): another copy of the"
                " run goes on there, or this run directory was rolled back: take another --checkpoint.dir and copy there"
                f" what was saved before, or delete {place}/step_{step:08d} if nobody needs it"
            )
        return None

    def cure_of_a_copy(self, place: str, step: int) -> str:
        """How a copy comes to checkpoints of its own."""
        copy = f"mkdir -p {self.own} && cp -r {place}/step_{step:08d} {self.own}/"
        return f"leave --checkpoint.dir out, and copy the checkpoint to go on from there ({copy})"


def directory(path: Path) -> dict[str, Any]:
    """What the file system says of a folder: it stays when the folder is renamed, and is another for a copy.

    Of a run directory on an object store its URL is all there is to say.
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
    """Whether two descriptions are of one folder. Device numbers mean something on one machine only, and until it restarts."""
    for part in ("inode", "birth", *(["device"] if here["machine"] == recorded["machine"] else [])):
        if here[part] is not None and recorded[part] is not None and here[part] != recorded[part]:
            return False
    return True


def machine() -> str:
    """The space in which a process id means one process: this start of this machine, and in it this container."""
    return _space("pid")


def network() -> str:
    """The space in which a loopback address means one place, which containers of a pod share."""
    return _space("net")


def _space(namespace: str) -> str:
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path(f'/proc/self/ns/{namespace}').stat().st_ino}"
    return socket.gethostname()


def _birth(path: Path) -> float | None:
    """When a folder was made, seconds since 1970; None where that is not known. (Python has no statx on Linux.)"""
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
