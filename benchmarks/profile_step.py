"""What one step of training is made of: time by groups of operators, and how fast the matrix products are.

    python benchmarks/profile_step.py [--size example 6x384 vocabulary] [--threads 1] [--dtype float32] [--optimizer muon]
    python benchmarks/profile_step.py --size gpt2 --micro-batches 1 --device cuda --dtype bfloat16

On a CPU milliseconds of processor time, on a GPU those between two events around each operator. All of a step is in it: the
gradient buffer, model, loss, clipping and optimizer, as a run has them, on random tokens; not the sum over workers, nor the
data. The least of `--steps` steps for each group. The last line is a step that was not looked into, and what lies between
the operators is the difference: autograd, Python and, on a GPU, waiting. The peak is that of benchmarks/train.py:
of a CPU a product of 2048 x 2048 in float32, of a GPU its data sheet.
"""

import argparse
import dataclasses
import math
import os
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from train import SIZES, peak, processor

from elastic_gpt import devices, huge_pages
from elastic_gpt.gradients import Gradients, not_finite, update
from elastic_gpt.world import World
from model_zoo.nanogpt.config import OptimizerConfig, TrainConfig
from model_zoo.nanogpt.model import GPT
from model_zoo.nanogpt.optimizer import make_optimizer
from model_zoo.nanogpt.startup import loss_function, merged_micro_batches

GROUPS = (  # words in an operator's name
    ("matrix products", ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")),
    ("attention", ("scaled_dot_product",)),
    ("activation", ("gelu", "relu", "silu", "threshold_backward")),
    ("norms", ("layer_norm", "rms_norm")),
    ("embedding", ("embedding",)),
    ("casts", ("_to_copy",)),
)
HEAD = "loss head"


class Profile(TorchDispatchMode):
    """Adds up time and, for products, operations by group.

    Attributes:
        part: where the step is: forward, backward, optimizer, or a group of its own.
    """

    def __init__(self, device: torch.device, vocab_size: int) -> None:
        super().__init__()
        self.device, self.vocab_size, self.part = device, vocab_size, "forward"
        self.took: list[tuple[str, Callable[[], float]]] = []
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        group, operations = self.group(str(func), args)
        self.operations[group] += operations
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = func(*args, **(kwargs or {}))
            end.record()
            self.took.append((group, lambda: start.elapsed_time(end)))
            return result
        began = time.process_time()
        result = func(*args, **(kwargs or {}))
        took = 1000 * (time.process_time() - began)
        self.took.append((group, lambda: took))
        return result

    def group(self, name: str, args: Any) -> tuple[str, int]:
        """The group of an operator, and the operations of a matrix product."""
        shapes = [tuple(one.shape) for one in args if isinstance(one, torch.Tensor)]
        if self.part not in ("forward", "backward"):
            return self.part, 0
        if "linear_cross_entropy" in name:  # forward and backward in one: three products
            (rows, width), (vocabulary, _) = shapes[:2]
            return HEAD, 6 * rows * width * vocabulary
        kind = next((kind for kind, words in GROUPS if any(word in name for word in words)), "rest")
        operations = 0
        if kind == "matrix products":
            one, other = shapes[-2:]
            operations = 2 * math.prod(one) * other[-1]
            kind += f", {self.part}"
        if kind != "embedding" and any(self.vocab_size in shape for shape in shapes):
            kind = HEAD
        return kind, operations


def step_of(config: TrainConfig, device: torch.device, micro_batches: int) -> Callable[..., None]:
    """A function that does one step; with a Profile it tells that where it is."""
    world = World(0, 1, 0, "", device, False)
    torch.manual_seed(1)
    model = GPT(config.model).to(device)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    optimizer = make_optimizer(model, config.optimizer, device)
    merged = min(merged_micro_batches(config, world), micro_batches)
    sequences, length = config.micro_batch * merged, config.model.block_size
    gradients = Gradients(
        model.parameters(), world, micro_batches=micro_batches, global_batch=micro_batches * config.micro_batch,
        tokens=micro_batches * config.micro_batch * length, exact=False,
    )  # fmt: skip
    loss_sum = loss_function(model, config, dtype, world.device)
    tokens = torch.randint(config.model.vocab_size, (sequences, length), device=device)
    ids = torch.arange(sequences, device=device)

    def step(profile: Profile | None = None) -> None:
        def now(part: str) -> None:
            if profile:
                profile.part = part

        now("zero, clip")
        gradients.zero()
        for number in range(0, micro_batches, merged):
            now("forward")
            loss = loss_sum(tokens, tokens)
            now("backward")
            gradients.backward(number, ids, loss)
        now("zero, clip")
        sums = gradients.reduce(False, False)
        skip = not_finite(sums, gradients.clip(config.optimizer.clip))
        now("optimizer")
        update(optimizer, skip)

    return step


def profile(name: str, options: argparse.Namespace) -> None:
    """Print the table of one size."""
    size, device = SIZES[name], devices.find_device(options.device)
    micro_batches = options.micro_batches or size.batch // size.micro_batch
    config = TrainConfig(
        global_batch=micro_batches * size.micro_batch, micro_batch=size.micro_batch, dtype=options.dtype,
        model=dataclasses.replace(size.model, activation=options.activation or size.model.activation),
        optimizer=OptimizerConfig(kind=options.optimizer),
    )  # fmt: skip
    step = step_of(config, device, micro_batches)
    highest = peak(options.device, options.threads)
    for _ in range(2):
        step()
    whole, groups, operations = math.inf, [], Counter[str]()
    for _ in range(options.steps):
        whole = min(whole, seconds(device, step))
        counter = Profile(device, config.model.vocab_size)
        with counter:
            step(counter)
        sums: dict[str, float] = defaultdict(float)
        for group, took in counter.took:
            sums[group] += took()
        groups.append(sums)
        operations = counter.operations
    tokens = config.global_batch * config.model.block_size
    print(
        f"\n{name}: {tokens:,} tokens a step in {options.dtype}, {options.optimizer}; peak {highest / 1e9:,.0f} GFLOP/s\n"
    )
    print("| | ms | GFLOP/s | of the peak |\n| --- | --- | --- | --- |")
    least = {group: min(one[group] for one in groups) for group in groups[0]}
    for group, milliseconds in sorted(least.items(), key=lambda one: -one[1]):
        rate = operations[group] / milliseconds * 1000 if operations[group] else 0.0
        fast = f"{rate / 1e9:,.0f} | {rate / highest:.0%}" if rate else "|"
        print(f"| {group} | {milliseconds:,.1f} | {fast} |")
    print(f"| between them | {max(0.0, 1000 * whole - sum(least.values())):,.1f} | | |")
    every = sum(operations.values()) / whole
    print(f"| a step | {1000 * whole:,.1f} | {every / 1e9:,.0f} | {every / highest:.0%} |", flush=True)


def seconds(device: torch.device, run: Callable[[], Any]) -> float:
    """Processor seconds; of a GPU seconds."""
    if devices.works_on(device):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        return time.perf_counter() - began
    began = time.process_time()
    run()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["example", "6x384", "vocabulary"])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"))
    parser.add_argument("--activation", help="instead of nanoGPT's gelu_erf")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, help="in a step, instead of those of the size's batch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")
    machine = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    pages = "huge pages" if huge_pages.SETTING in os.environ.get("GLIBC_TUNABLES", "") else "small pages"
    print(
        f"{machine}, {options.threads} threads, {pages}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    for name in options.size:
        profile(name, options)


if __name__ == "__main__":
    huge_pages.start_over_with_huge_pages()
    main()
