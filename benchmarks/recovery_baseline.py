"""The training of recovery.py's baselines: the same model, data and pace, with DDP and each system's own checkpoints.

Started by recovery.py under torchrun or dlrover-run. Appends JSON lines to OUT/steps.jsonl: every
worker its process id when it starts, rank 0 a line a completed step.
"""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from elastic_gpt import settings
from elastic_gpt.order import Order, sequence_count
from model_zoo.nanogpt.config import PRESETS, TrainConfig
from model_zoo.nanogpt.model import GPT
from prepare.data import open_split, read_meta

MEMORY_INTERVAL, DISK_INTERVAL = 10, 50  # steps
STEP_SECONDS = 0.025


class DiskCheckpoint:
    """What a plain torchrun script does: rank 0 writes one file every DISK_INTERVAL steps, all read it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoint.pt"

    def load(self) -> dict[str, Any]:
        return torch.load(self.path) if self.path.exists() else {}

    def save(self, step: int, state: dict[str, Any]) -> None:
        if step % DISK_INTERVAL == 0 and dist.get_rank() == 0:
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

    def save(self, step: int, state: dict[str, Any]) -> None:
        from dlrover.trainer.torch.flash_checkpoint.ddp import StorageType

        if step % DISK_INTERVAL == 0:
            self.checkpointer.save_checkpoint(step, state, storage_type=StorageType.DISK)
        elif step % MEMORY_INTERVAL == 0:
            self.checkpointer.save_checkpoint(step, state, storage_type=StorageType.MEMORY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flash", action="store_true", help="DdpCheckpointer instead of torch.save")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    lines = os.open(args.out / "steps.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(**facts: Any) -> None:
        os.write(lines, (json.dumps({"pid": os.getpid(), "time": time.time(), **facts}) + "\n").encode())

    write()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    config = settings.parse(TrainConfig, ["debug_cpu"], presets=PRESETS, prog="baseline", environment={})
    shape = dataclasses.replace(config.model, vocab_size=read_meta(args.data).vocab_size)
    length = config.model.block_size
    tokens = open_split(args.data, "train")
    order = Order(sequence_count(len(tokens), length), config.global_batch, config.seed)

    torch.manual_seed(config.seed)
    model = DistributedDataParallel(GPT(shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.learning_rate, fused=True)
    checkpoint: FlashCheckpoint | DiskCheckpoint = FlashCheckpoint(args.out) if args.flash else DiskCheckpoint(args.out)
    step = 0
    if state := checkpoint.load():
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = int(state["step"])
    while True:
        began = time.monotonic()
        # The position is a function of the step, so a step that is done again is all that a restart can cost.
        mine = order.ids(step)[rank::size]
        block = torch.from_numpy(tokens[mine[:, None] * length + np.arange(length + 1)].astype(np.int64))
        loss = model(block[:, :-1].contiguous(), block[:, 1:].contiguous()) / (len(mine) * length)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        checkpoint.save(step, {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
        if rank == 0:
            write(step=step, world=size)
        time.sleep(max(0.0, STEP_SECONDS - (time.monotonic() - began)))


if __name__ == "__main__":
    main()
