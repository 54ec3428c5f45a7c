"""The training of the systems that a drill is held against (elastic_gpt/drill/systems.py): one model, data and pace, but
each system's own way to keep and to find its state, as its documentation shows it.

    python -m model_zoo.nanogpt.baseline file|flash|torchft --data DATA --out OUT

Started on each node by torchrun or dlrover-run. Appends JSON lines to OUT/steps.jsonl: every worker its process id when it
starts, and a line for each step that it did with others: `step` (1 is the first), `world` (workers in it), `life` (the same
for all of one world), `ids` (the sequences that it used) and its `loss` (mean over them).
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from elastic_gpt import settings
from elastic_gpt.order import Order, sequence_count
from elastic_gpt.processes import die_with_parent
from model_zoo.nanogpt.config import PRESETS, TrainConfig
from model_zoo.nanogpt.model import GPT
from prepare.data import open_split, read_meta
from prepare.frontdoor import Parser, whole

MEMORY_INTERVAL, DISK_INTERVAL = 10, 50  # steps
STEP_SECONDS = 0.025

Write = Callable[..., None]


class Training:
    """What all of them train: `debug_cpu`, without dropout.

    Args:
        data: prepared text.
    """

    def __init__(self, data: Path) -> None:
        config = settings.parse(TrainConfig, ["debug_cpu"], presets=PRESETS, prog="baseline", environment={})
        self.length, self.global_batch, self.seed = config.model.block_size, config.global_batch, config.seed
        self.tokens = open_split(data, "train")
        self.sequences = sequence_count(len(self.tokens), self.length)
        torch.manual_seed(self.seed)
        self.model = GPT(dataclasses.replace(config.model, vocab_size=read_meta(data).vocab_size, dropout=0.0))
        self.rate = config.optimizer.learning_rate

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.rate, fused=True)

    def batch(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of sequences, int64 (sequences, length)."""
        places = np.asarray(ids)[:, None] * self.length + np.arange(self.length + 1)
        block = torch.from_numpy(self.tokens[places].astype(np.int64))
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()


class DiskCheckpoint:
    """What a plain torchrun script does: rank 0 writes one file every DISK_INTERVAL steps, all read it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoint.pt"

    def load(self) -> dict[str, Any]:
        return torch.load(self.path) if self.path.exists() else {}

    def save(self, step: int, state: dict[str, Any], first: bool) -> None:
        if step % DISK_INTERVAL == 0 and first:
            partial = self.path.with_suffix(".partial")
            torch.save(state, partial)
            partial.rename(self.path)


class FlashCheckpoint:
    """DLRover's DdpCheckpointer as its documentation shows it."""

    def __init__(self, folder: Path) -> None:
        from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer

        self.checkpointer = DdpCheckpointer(str(folder / "checkpoints"))

    def load(self) -> dict[str, Any]:
        return self.checkpointer.load_checkpoint() or {}

    def save(self, step: int, state: dict[str, Any], first: bool) -> None:  # noqa: ARG002 - all ranks take part
        from dlrover.trainer.torch.flash_checkpoint.ddp import StorageType

        if step % DISK_INTERVAL == 0:
            self.checkpointer.save_checkpoint(step, state, storage_type=StorageType.DISK)
        elif step % MEMORY_INTERVAL == 0:
            self.checkpointer.save_checkpoint(step, state, storage_type=StorageType.MEMORY)


def with_ddp(
    training: Training, checkpoint: FlashCheckpoint | DiskCheckpoint, steps: int, pace: Any, write: Write
) -> None:
    """DDP under torchrun or dlrover-run: a world ends with any of its members, and the next one begins from a checkpoint."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    life: list[Any] = [os.getpid()]
    dist.broadcast_object_list(life)
    order = Order(training.sequences, training.global_batch, training.seed)
    model, optimizer = DistributedDataParallel(training.model), training.optimizer()
    step = 0
    if state := checkpoint.load():
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = int(state["step"])
    while step < steps:
        began = time.monotonic()
        # The position is a function of the step, and the gradient the mean over the global batch whatever the world: with
        # torch's DistributedSampler and a mean of means, as many scripts have them, more would be lost than steps.
        mine = order.ids(step)[rank::size].tolist()
        loss = model(*training.batch(mine))
        optimizer.zero_grad()
        (loss * size / (training.global_batch * training.length)).backward()
        optimizer.step()
        step += 1
        write(step=step, world=size, life=life[0], ids=mine, loss=loss.item() / (len(mine) * training.length))
        state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        checkpoint.save(step, state, first=rank == 0)
        pace(began)


def with_torchft(
    training: Training, out: Path, steps: int, pace: Any, write: Write, *, group: int, groups: int, least: int
) -> None:
    """torchft, as the example in its repository has it: replica groups of one worker, a quorum at each step, state from a
    living one; each group has its own share of the data, and its own batches, whose number is that of the groups there are.

    What its example leaves to the user is done as the comments in it say: a checkpoint of model, optimizer and manager now
    and then, and the position in the data of each group at every step. But for its DistributedDataParallel: in 0.2.0 a lost
    peer ends it with an AssertionError where the sums are gloo's, so the gradient is summed by the manager's own all_reduce.

    Args:
        group, groups: number of this replica group, and the most there may be.
        least: replica groups without which no step is done.
    """
    import torchft
    from torchft.checkpointing.pg_transport import PGTransport

    sampler = torchft.DistributedSampler(
        range(training.sequences), replica_rank=group, num_replica_groups=groups, group_rank=0, num_replicas=1
    )
    position = out / f"position-{group}"
    batches = _batches(sampler, training.global_batch // groups, int(position.read_text()) if position.exists() else 0)

    def load(state: dict[str, Any]) -> None:
        training.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def save() -> dict[str, Any]:
        return {"model": training.model.state_dict(), "optimizer": optimizer.state_dict()}

    process_group = torchft.ProcessGroupGloo(timeout=timedelta(seconds=5))
    manager = torchft.Manager(
        pg=process_group,
        min_replica_size=least,
        load_state_dict=load,
        state_dict=save,
        replica_id=f"baseline_{group}",
        timeout=timedelta(seconds=30),
        checkpoint_transport=PGTransport(process_group, timeout=timedelta(seconds=10), device="cpu"),
        hostname="127.0.0.1",
    )
    optimizer = torchft.Optimizer(manager, training.optimizer())
    checkpoint = DiskCheckpoint(out)
    if state := checkpoint.load():
        load(state)
        manager.load_state_dict(state["manager"])
    for drawn, mine in batches:
        if manager.current_step() >= steps:
            break
        began = time.monotonic()
        position.write_text(str(drawn))
        optimizer.zero_grad()  # asks for the quorum of this step
        loss = training.model(*training.batch(mine)) / (len(mine) * training.length)
        loss.backward()
        gradients = [parameter.grad for parameter in training.model.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        manager.allreduce(flat).wait()
        for gradient, mean in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
        world, before = manager.num_participants(), manager.current_step()
        optimizer.step()  # unless a peer was lost on the way: then the batch is dropped
        step = manager.current_step()
        if step > before and manager.is_participating():
            # The number of the quorum is nowhere public, and nothing else tells one world from another.
            write(step=step, world=world, life=manager._quorum_id, ids=mine, loss=loss.item())
            checkpoint.save(step, save() | {"manager": manager.state_dict()}, first=manager.participating_rank() == 0)
        pace(began)
    manager.shutdown(wait=False)


def _batches(sampler: Any, size: int, position: int) -> Iterator[tuple[int, list[int]]]:
    """Batches without end from that position on, each with the position after it."""
    while True:
        each = -(-len(sampler) // size)  # batches an epoch
        epoch, first = divmod(position, each)
        sampler.set_epoch(epoch)
        ids = list(sampler)
        for number in range(first, each):
            position += 1
            yield position, ids[number * size : (number + 1) * size]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("baseline", description=__doc__)
    parser.add_argument("way", choices=("file", "flash", "torchft"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=whole(1), default=sys.maxsize)
    parser.add_argument(
        "--undisturbed", action="store_true", help="as fast as it goes; torchft: with all replica groups"
    )
    args = parser.parse_args(argv)
    lines = os.open(args.out / "steps.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(**facts: Any) -> None:
        os.write(lines, (json.dumps({"pid": os.getpid(), "time": time.time(), **facts}) + "\n").encode())

    def pace(began: float) -> None:
        time.sleep(0.0 if args.undisturbed else max(0.0, STEP_SECONDS - (time.monotonic() - began)))

    die_with_parent(os.getppid())  # nothing is left of a drill that is killed
    write()
    torch.set_num_threads(1)
    training = Training(args.data)
    if args.way == "torchft":
        group, groups = int(os.environ["REPLICA_GROUP_ID"]), int(os.environ["NUM_REPLICA_GROUPS"])
        least = groups if args.undisturbed else 1
        with_torchft(training, args.out, args.steps, pace, write, group=group, groups=groups, least=least)
    else:
        checkpoint = FlashCheckpoint(args.out) if args.way == "flash" else DiskCheckpoint(args.out)
        with_ddp(training, checkpoint, args.steps, pace, write)


if __name__ == "__main__":
    main()
