"""Compares a step with our flat gradient buffer, also in exact mode, with DistributedDataParallel, in turn in one run.

    python benchmarks/gradients.py [--workers 2] [--micro-batches 2 8] [--rounds 7]
    python benchmarks/gradients.py --workers 2 3 --link 100mbit 1gbit loopback        (as root)

Prints seconds a step and the ratio to DDP's (below 1: ours is faster), medians of interleaved steps, over gloo on this machine.
With a rate as --link each worker is in a network namespace of its own, whose only way to the others is a link of that rate.
"""

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn.parallel import DistributedDataParallel

from elastic_gpt.gradients import Gradients
from elastic_gpt.order import share
from elastic_gpt.settings import Traffic
from elastic_gpt.world import World, join, leave
from model_zoo.nanogpt.model import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=512, block_size=128, n_layer=6, n_head=6, n_embd=384)  # 10.9M parameters
SEQUENCES = 4  # in a micro-batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument(
        "--micro-batches", type=int, nargs="+", default=[2, 8], help="in a step, of all workers together"
    )
    parser.add_argument("--rounds", type=int, default=7, help="steps of each kind that are counted")
    parser.add_argument("--link", nargs="+", default=["loopback"], metavar="RATE", help="as tc has it, or loopback")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        measure(arguments.micro_batches, arguments.rounds)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the network is taken down then, too
    print(f"torch {torch.__version__}, gloo processes of 1 thread each, medians of {arguments.rounds} steps")
    counts = [str(count) for count in arguments.micro_batches]
    command = [sys.executable, __file__, "--rounds", str(arguments.rounds), "--micro-batches", *counts]
    for workers in arguments.workers:
        for rate in arguments.link:
            load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
            print(f"{workers} workers, {rate}; load average before {load}:", flush=True)
            if rate == "loopback":
                start(command, "127.0.0.1", "lo", [[]] * workers)
                continue
            with network(workers, rate) as prefixes:
                start(command, address(0), "eth0", prefixes)


def start(command: list[str], first: str, interface: str, prefixes: list[list[str]]) -> None:
    """Run `command` as each rank, with the command before it that puts it into its place."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    place = {
        "MASTER_ADDR": first,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(len(prefixes)),
        "GLOO_SOCKET_IFNAME": interface,
    }
    ranks = [
        subprocess.Popen([*prefix, *command, "--rank", str(rank)], env=os.environ | place | {"RANK": str(rank)})
        for rank, prefix in enumerate(prefixes)
    ]
    try:
        if any(rank.wait() for rank in ranks):
            sys.exit("a worker failed")
    finally:
        for rank in ranks:
            rank.kill()


def address(rank: int) -> str:
    return f"10.214.0.{rank + 1}"


@contextlib.contextmanager
def network(workers: int, rate: str) -> Iterator[list[list[str]]]:
    """A switch and, for each rank, a namespace with a link of `rate` to it. Yields what to put before a command, for each."""
    name = f"gradients{os.getpid()}"

    def ip(command: str) -> None:
        subprocess.run(["ip", *command.split()], check=True)

    def limit(before: list[str], device: str) -> None:
        queue = ["tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", rate, "burst", "64kb", "latency", "50ms"]
        subprocess.run([*before, *queue], check=True)

    # In a namespace, too: what is left of a run that is killed touches nobody.
    names = [f"{name}-{rank}" for rank in range(workers)]
    try:
        for one in (name, *names):
            ip(f"netns add {one}")
        ip(f"-n {name} link add switch type bridge")
        ip(f"-n {name} link set switch up")
        for rank, one in enumerate(names):
            ip(f"-n {name} link add port{rank} type veth peer name eth0 netns {one}")
            ip(f"-n {name} link set port{rank} master switch up")
            ip(f"-n {one} address add {address(rank)}/24 dev eth0")
            ip(f"-n {one} link set eth0 up")
            ip(f"-n {one} link set lo up")
            limit(["ip", "netns", "exec", name], f"port{rank}")
            limit(["ip", "netns", "exec", one], "eth0")
        yield [["ip", "netns", "exec", one] for one in names]
    finally:
        for one in (name, *names):
            subprocess.run(["ip", "netns", "delete", one], check=False)


def measure(micro_batches_in_a_step: list[int], rounds: int) -> None:
    torch.set_num_threads(1)
    world = join("cpu", 120.0)
    for micro_batches in micro_batches_in_a_step:
        steps = {
            "DDP, no_sync until the last": ddp_step(world, micro_batches),
            "sent after the backward pass": our_step(world, micro_batches, overlapped=False),
            "flat buffer": our_step(world, micro_batches),
            "flat buffer, exact": our_step(world, micro_batches, exact=True),
            "flat buffer, bfloat16 traffic": our_step(world, micro_batches, traffic="bfloat16"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds + 1):
            for name, step in steps.items():
                world.gather(None)  # together
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
        counted = {name: times[1:] for name, times in seconds.items()}
        base = next(iter(steps))

        def ratio(name: str, to: str, counted: dict[str, list[float]] = counted) -> float:
            return statistics.median(a / b for a, b in zip(counted[name], counted[to], strict=True))

        if world.first:
            for name, times in counted.items():
                middle = statistics.median(times)
                print(
                    f"  {micro_batches:>2} micro-batches, {name:<29}: {middle:6.3f} s, {ratio(name, base):.2f} of DDP"
                )
            cost = ratio("flat buffer, exact", "flat buffer")
            print(f"  {micro_batches:>2} micro-batches, exact to inexact: {cost:.2f}", flush=True)
    leave()


def data(micro_batches: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(CONFIG.vocab_size, (micro_batches, SEQUENCES, CONFIG.block_size + 1))
    return tokens[:, :, :-1].contiguous(), tokens[:, :, 1:].contiguous()


def our_step(
    world: World, micro_batches: int, *, exact: bool = False, traffic: Traffic = "float32", overlapped: bool = True
) -> Callable[[], None]:
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
        traffic=traffic,
    )
    if not overlapped:
        gradients._sending = contextlib.nullcontext  # type: ignore[method-assign,assignment]

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
