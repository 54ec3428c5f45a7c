"""The state that must survive (parameters, the optimizer's moments, the step), and where it is restored from.

The state is a flat mapping of names to *live* tensors: saving reads the tensors that train, and
restoring writes them. All ranks restore together. One rank has the newest state: in the tensors of
a worker that lives on, in the shared memory of a node that survived, or else on storage. It sends
the state to all others.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from elastic_gpt.checkpoint import CheckpointError, Checkpoints
from elastic_gpt.identity import Run
from elastic_gpt.settings import Resume
from elastic_gpt.snapshot import Snapshot, Snapshots
from elastic_gpt.storage import Unreachable
from elastic_gpt.world import PeerLost, World


class NotFinite(ValueError):
    """The state is not finite, or too many updates in a row were not. The message has the step and the cure."""


@dataclass
class Held:
    """The state in the tensors of a worker that lives on. It is whole between two steps, whatever happens to peers."""

    step: int = -1
    """Updates done; -1: the tensors have no state, or are half overwritten."""
    life: int = -1
    """Number of the life in which the updates were done."""
    reports: list[dict[str, Any]] = field(default_factory=list)
    """The recent step reports, oldest first."""


class Offer(NamedTuple):
    """What one rank could give the others to go on from. The greatest is the newest."""

    step: int
    """Updates done; -1: nothing."""
    life: int
    lives_on: bool
    """Whether it is in the tensors of a worker that lives on, else in a snapshot."""
    holder: str
    """The node that it is of."""


@dataclass
class Memory:
    """What this worker has of a run in memory: in its own tensors, or else a snapshot on this machine."""

    held: Held
    snapshots: Snapshots | None
    """This node's, on its first worker; None on others."""
    snapshot: Snapshot | None = None
    """What `offer` found."""

    def offer(self, run: Run, node: str) -> Offer:
        """Look for the newest state of the run's history."""

        def valid(snapshot: Snapshot) -> bool:
            known = run.lives.get(snapshot.name) == snapshot.life and snapshot.history_bytes <= run.history_bytes
            return known and run.valid(snapshot.life, snapshot.step)

        if self.held.step >= 0 and run.valid(self.held.life, self.held.step):
            return Offer(self.held.step, self.held.life, True, node)
        self.snapshot = self.snapshots.newest(valid) if self.snapshots else None
        if self.snapshot:
            return Offer(self.snapshot.step, self.snapshot.life, False, self.snapshot.header.parent.name)
        return Offer(-1, -1, False, node)

    @property
    def reports(self) -> list[dict[str, Any]]:
        """The step reports that go with what was offered."""
        return self.snapshot.reports if self.snapshot else self.held.reports


@dataclass(frozen=True)
class Restored:
    """The state with which a life of the run begins."""

    step: int
    """Updates done."""
    source: str
    """Where it came from: `worker of node N` (one that lives on), `snapshot of node N`, `checkpoint step_...` or `start`."""
    reports: list[dict[str, Any]]
    """The step reports that came with it, oldest first. They replace lines that a killed rank 0 did not write."""
    choice: str = ""
    """One line that says whether memory or storage was taken, and why; "" if they agree."""


def training_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Live tensors by name: `model.<parameter>`, `optimizer.<moment>.<parameter>`, in float16 also `optimizer.scaler`.

    AdamW makes its moments at the first update. So this does one at rate zero, which changes
    nothing else.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{moment}.{name}"] = value.zero_()
    if scaler is not None:
        tensors["optimizer.scaler"] = scaler
    return {name: tensor.detach() for name, tensor in tensors.items()}


@torch.no_grad()
def broken(tensors: dict[str, torch.Tensor]) -> str | None:
    """Name of a tensor with a NaN or an infinity, or None. Reads the state once and waits for the device once."""
    device = next(iter(tensors.values())).device
    sums = torch.stack([tensor.sum().to(device) for tensor in tensors.values()])
    if sums.isfinite().all():
        return None
    # A sum of large numbers may overflow though each is finite.
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


@torch.no_grad()
def restore(
    tensors: dict[str, torch.Tensor],
    memory: Memory,
    offers: Sequence[Offer],
    checkpoints: Checkpoints,
    run: Run,
    world: World,
    resume: Resume = "auto",
) -> Restored:
    """Fill `tensors` on every rank with the newest state there is, or with rank 0's initial values.

    Args:
        tensors: the live state.
        memory: what this worker has. What it holds stays if no rank has a newer state.
        offers: what each rank has, in order of rank.
        checkpoints: the run's checkpoints.
        run: the run and its history.
        world: the ranks that restore.
        resume: what a new job begins with if memory is ahead of storage. `auto`: memory, unless the checkpoint that was
            saved last was deleted, which is how people go back. Within a job it is always memory.

    Raises:
        CheckpointError: on every rank, if no checkpoint is whole, or all of them have disappeared. A run never starts
            over silently.
        Unreachable: on every rank, if storage does not answer and may have a state that no memory has.
    """

    # --- which states there are, in memory and on storage
    held, there = memory.held, [offer[:3] for offer in offers]
    best = there.index(max(there))
    newest, life, _ = there[best]

    def look_at_storage() -> tuple[bool, str, int | None, Unreachable | None]:
        """Whether storage is taken although memory is ahead, why, and the step of the newest that memory lacks."""
        back, why = False, ""
        try:
            if newest >= 0 and not run.continues:
                back, why = _goes_back(newest, checkpoints, run, resume)
            return back, why, checkpoints.newest_step(newer_than=-1 if back else newest), None
        except Unreachable as error:
            return back, why, None, error

    mine_of_it = memory.reports if world.rank == best else []
    (back, choice, stored, away), told = world.first_does_beside(look_at_storage, mine_of_it)
    if away:
        if back or newest < 0 or life < run.life - 1:
            raise away
        # The life before kept snapshots up to its end, so storage is ahead by at most the interval between them.
        if world.first:
            print(f"warning: {away}; the run goes on from memory", file=sys.stderr, flush=True)
    newest = -1 if back else newest
    if resume == "memory" and run.life > 0 and not run.continues and (newest < 0 or stored is not None):
        raise CheckpointError(
            f"no node holds this run in memory{f' as far as step {stored} on storage' if stored else ''}:"
            " leave --resume memory out"
        )
    # --- one rank reads the newest one, or knows why there is none
    reports: list[dict[str, Any]] = []
    same = False  # whether all ranks have it in their tensors already
    if stored is not None:
        reader, step, source = 0, stored, f"checkpoint {checkpoints.name(stored)}"
    elif newest >= 0:
        living = (newest, life, True)
        reader, step = best, newest
        same = all(one == living for one in there)
        source = f"{'worker' if there[reader] == living else 'snapshot'} of node {offers[reader].holder}"
    elif run.saved:
        step, place = run.saved
        cure = "mount it, or set --checkpoint.dir back; to start over, take another --run-dir"
        raise CheckpointError(
            f"step {step} of this run was saved in {place}, but there is no checkpoint in {checkpoints.storage}:"
            f" {run.cure_of_a_copy(place, step) if place in run.left else cure}"
        )
    else:
        reader, step, source = 0, 0, "start"
        if world.gather(held.life)[0] >= 0:
            held.step = -1
            raise PeerLost("what the first worker holds is no start and no part of the run's history: a new one starts")
    if there[world.rank] != (step, life, True):
        held.step = -1  # from here on the tensors are being overwritten
    if stored is not None:
        reports = world.first_does(lambda: checkpoints.load(stored, tensors))
    elif same:
        reports = held.reports
    elif newest >= 0:
        if world.rank == reader and memory.snapshots and memory.snapshot:
            memory.snapshots.load(memory.snapshot, tensors)
        reports = told[reader]
    if not same:
        world.broadcast(list(tensors.values()), reader)
    held.step, held.life, held.reports = step, run.life, reports
    return Restored(step, source, reports, choice)


def _goes_back(newest: int, checkpoints: Checkpoints, run: Run, resume: Resume) -> tuple[bool, str]:
    """Whether storage is taken although memory has step `newest`, and the line that says so."""
    steps = checkpoints.steps()
    stored = max(steps, default=None)
    if stored is not None and stored >= newest:
        return False, ""
    ahead = (
        f"memory holds step {newest}, storage step {stored}" if steps else f"memory holds step {newest}, storage none"
    )
    if resume == "storage":
        return True, f"{ahead}: storage is taken, as --resume storage says"
    if resume == "memory":
        return False, f"{ahead}: memory is taken, as --resume memory says"
    if steps and run.saved and run.saved[0] not in steps and run.saved[0] > max(steps):
        return True, (
            f"{ahead}: storage is taken, for step {run.saved[0]} was saved and has been deleted"
            " (--resume memory takes the other)"
        )
    return False, f"{ahead}: memory is taken, for the run was killed there (--resume storage goes back)"
