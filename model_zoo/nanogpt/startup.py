"""What each life of a run starts with: numbers, loss, snapshots, observers, and the arithmetic that is told."""

import sys
from collections.abc import Callable

import torch

from elastic_gpt.ledger import Ledger
from elastic_gpt.observers import ConsoleObserver, MetricsObserver, TensorBoardObserver
from elastic_gpt.order import Order, share
from elastic_gpt.reports import Observer
from elastic_gpt.snapshot import SnapshotError, Snapshots, shared_memory
from elastic_gpt.state import Restored
from elastic_gpt.world import World
from model_zoo.nanogpt.config import TrainConfig
from model_zoo.nanogpt.model import GPT
from prepare.tokens import Meta


def open_snapshots(run_id: str, tensors: dict[str, torch.Tensor], world: World) -> Snapshots | None:
    """This node's snapshots, on its first worker. Too little shared memory is said, and the run goes on without."""
    if not world.first_of_node:
        return None
    try:
        return Snapshots(shared_memory() / run_id, world.node, run_id, tensors)
    except SnapshotError as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
        return None


def open_observers(
    config: TrainConfig, nodes: list[str], world: World, restored: Restored, ledger: Ledger
) -> tuple[list[Observer], float | None]:
    """The observers of a world, on its first worker; and when the last step before was written, seconds since 1970.

    The ledger gets the beginning of this life.
    """
    if not world.first:
        return [], None
    metrics = MetricsObserver(config.run_dir / "metrics.jsonl", restored.step, restored.reports)
    ledger.begin_life(nodes, world.size, restored.step, restored.source, metrics.dropped)
    observers: list[Observer] = [ConsoleObserver(config.steps, restored.step, config.observe.interval), metrics]
    if config.observe.tensorboard:
        observers.append(TensorBoardObserver(config.run_dir / "tensorboard", restored.step))
    return observers, metrics.last_step


def pick_dtype(config: TrainConfig, world: World) -> torch.dtype:
    if config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.dtype]
    return torch.bfloat16 if world.device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def loss_function(
    model: GPT, config: TrainConfig, dtype: torch.dtype, world: World
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(tokens, targets) to the sum of the cross-entropy, in the run's dtype and compiled where that is asked for."""
    # The raw model is compiled, and the world stays out of the graph: a membership change recompiles nothing.
    forward = torch.compile(model, dynamic=False) if config.compile else model

    def loss_sum(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
            return forward(tokens, targets)

    return loss_sum


def arithmetic(
    config: TrainConfig, meta: Meta, model: GPT, order: Order, world: World, dtype: torch.dtype, restored: Restored
) -> list[str]:
    """The batch arithmetic and where the run begins, for a person."""
    shares = sorted({len(share(config.micro_batches, rank, world.size)) for rank in range(world.size)})
    per_rank = " or ".join(str(count) for count in shares)
    epochs = config.steps * config.global_batch / order.sequences
    return [
        f"model: {model.parameter_count():,} parameters, vocabulary {config.model.vocab_size:,};"
        f" {str(dtype).removeprefix('torch.')} on {world.device.type}",
        f"data: {meta.splits['train'].tokens:,} training tokens in {order.sequences:,} sequences of {config.model.block_size};"
        f" {epochs:,.2f} epochs in {config.steps:,} steps",
        f"batch: {config.global_batch} sequences x {config.model.block_size} = {config.tokens_per_step:,} tokens a step,"
        f" in {config.micro_batches} micro-batches of {config.micro_batch}, {per_rank} on each of {world.size} workers",
        f"run: {config.run_dir}, {'from step ' + str(restored.step) if restored.step else 'from the start'}"
        + (f" ({restored.source})" if restored.step else ""),
    ]
