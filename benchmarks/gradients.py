"""Compares a step with our flat gradient buffer, also in exact mode, with DistributedDataParallel, in turn in one run.

    python benchmarks/gradients.py [--workers 2]

Prints the ratio of our time to DDP's (below 1: ours is faster), median of interleaved steps, over
gloo on this machine.
"""

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable

import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from elastic_gpt.gradients import Gradients
from elastic_gpt.order import share
from elastic_gpt.world import World, join, leave
from model_zoo.nanogpt.model import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=512, block_size=128, n_layer=6, n_head=6, n_embd=384)  # 10.9M parameters
SEQUENCES = 4  # in a micro-batch
ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    workers = parser.parse_args().workers
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(measure, (workers, port), nprocs=workers)


def measure(rank: int, workers: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(workers)}
    torch.set_num_threads(1)
    world = join("cpu", 120.0)
    if world.first:
        print(f"torch {torch.__version__}, {workers} gloo processes, 1 thread each; ratio to DDP, median of {ROUNDS}")
    for micro_batches in (workers, 4 * workers):
        steps = {
            "DDP, no_sync until the last": ddp_step(world, micro_batches),
            "flat buffer": our_step(world, micro_batches, exact=False),
            "flat buffer, exact": our_step(world, micro_batches, exact=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(ROUNDS + 1):
            for name, step in steps.items():
                world.gather(None)  # together
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
        if world.first:
            base, *others = steps
            for name in others:
                pairs = zip(seconds[name][1:], seconds[base][1:], strict=True)
                print(
                    f"  {micro_batches:>2} micro-batches, {name:<18}: {statistics.median(a / b for a, b in pairs):.2f}"
                )
    leave()


def data(micro_batches: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(CONFIG.vocab_size, (micro_batches, SEQUENCES, CONFIG.block_size + 1))
    return tokens[:, :, :-1].contiguous(), tokens[:, :, 1:].contiguous()


def our_step(world: World, micro_batches: int, *, exact: bool) -> Callable[[], None]:
    model, (tokens, targets) = GPT(CONFIG), data(micro_batches)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.arange(micro_batches * SEQUENCES).view(micro_batches, SEQUENCES)
    gradients = Gradients(
        model.parameters(),
        world,
        micro_batches=micro_batches,
        global_batch=ids.numel(),
        tokens=targets.numel(),
        exact=exact,
    )

    def step() -> None:
        gradients.zero()
        for index in share(micro_batches, world.rank, world.size):
            gradients.backward(index, ids[index], model(tokens[index], targets[index]))
        gradients.reduce(stop=False, leave=False)
        gradients.clip(1.0)
        optimizer.step()

    return step


def ddp_step(world: World, micro_batches: int) -> Callable[[], None]:
    model, (tokens, targets) = DistributedDataParallel(GPT(CONFIG)), data(micro_batches)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    mine = share(micro_batches, world.rank, world.size)

    def step() -> None:
        optimizer.zero_grad()
        for index in mine[:-1]:
            with model.no_sync():
                (model(tokens[index], targets[index]) / targets.numel()).backward()
        (model(tokens[mine[-1]], targets[mine[-1]]) / targets.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
