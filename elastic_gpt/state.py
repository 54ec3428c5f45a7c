"""What must survive: the parameters, the optimizer's moments and the step; and where they are restored from.

The state is a flat mapping of names to *live* tensors, so saving reads the tensors that train and restoring writes them.
A restore is a collective step: the newest state that any surviving node holds in memory, else the newest on storage,
is read by one rank and sent to all the others.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch

from elastic_gpt.checkpoint import CheckpointError, Checkpoints
from elastic_gpt.snapshot import Snapshots
from elastic_gpt.storage import Unreachable
from elastic_gpt.world import World


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

    def valid(self, life: int, step: int) -> bool:
        """Whether the state after `step` of `life` is in the run's history, not in an end that a later life abandoned."""
        return all(step <= began for later, began in self.branches if later > life)


@dataclass(frozen=True)
class Restored:
    """Where a life of the run begins."""

    step: int
    """Updates done."""
    source: str
    """`snapshot of node N`, `checkpoint step_...`, or `start`."""
    reports: list[dict[str, Any]]
    """The step reports that came with the state, oldest first: they fill what a killed rank 0 did not write."""


def training_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Live tensors by name: `model.<parameter>`, `optimizer.<moment>.<parameter>`, and a float16 run's `optimizer.scaler`.

    AdamW makes its moments at the first step; one update at rate zero makes them now, and changes nothing else.
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
def restore(
    tensors: dict[str, torch.Tensor],
    snapshots: Snapshots | None,
    checkpoints: Checkpoints,
    run: Run,
    world: World,
) -> Restored:
    """Fill `tensors` on every rank with the newest state there is, or with rank 0's initial values.

    Args:
        snapshots: this node's, on the first worker of the node; None elsewhere.

    Raises:
        CheckpointError: on every rank, if there are checkpoints and none is whole, or none where there were some: a run
            never starts over silently.
        Unreachable: on every rank, if storage does not answer and may hold what no memory does.
    """
    snapshot = snapshots.newest(run.valid) if snapshots else None
    held = world.gather((snapshot.step, snapshot.life) if snapshot else (-1, -1))
    newest, life = max(held)
    try:
        stored = world.first_does(lambda: checkpoints.newest_step(newer_than=newest))
    except Unreachable as error:
        if newest < 0 or life < run.life - 1:
            raise
        # The life before this one kept snapshots up to its end: storage cannot be ahead by more than they are apart.
        stored = None
        if world.first:
            print(f"warning: {error}; the run goes on from memory", file=sys.stderr, flush=True)
    reports: list[dict[str, Any]] = []
    if stored is not None:
        reader, step, source = 0, stored, f"checkpoint {checkpoints.name(stored)}"
        reports = world.first_does(lambda: checkpoints.load(stored, tensors))
    elif newest >= 0:
        reader, step = held.index((newest, life)), newest
        source = f"snapshot of node {world.gather(snapshot.header.parent.name if snapshot else '')[reader]}"
        if world.rank == reader and snapshots and snapshot:
            snapshots.load(snapshot, tensors)
        reports = world.gather(snapshot.reports if snapshot and world.rank == reader else [])[reader]
    elif run.saved:
        raise CheckpointError(
            f"step {run.saved[0]} of this run was saved in {run.saved[1]}, but there is no checkpoint in"
            f" {checkpoints.storage}: mount it, or set --checkpoint.dir back; to start over, take another --run-dir"
        )
    else:
        reader, step, source = 0, 0, "start"
    world.broadcast(list(tensors.values()), reader)
    return Restored(step, source, reports)
