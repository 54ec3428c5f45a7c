"""The start of a training: its settings as an elastic Plan, its loss function, and the batch arithmetic in words."""

from collections.abc import Callable

import torch

from elastic_gpt.devices import is_host
from elastic_gpt.mirror import shown
from elastic_gpt.order import Order, share
from elastic_gpt.plan import Plan
from elastic_gpt.state import Restored
from elastic_gpt.world import World
from model_zoo.nanogpt.config import TrainConfig
from model_zoo.nanogpt.model import GPT
from prepare.tokens import Meta

MERGED_TOKENS = 1024  # tokens in one forward pass; more is not faster


def plan(config: TrainConfig) -> Plan:
    """The settings of a training that every elastic run has."""
    return Plan(
        run_dir=config.run_dir,
        steps=config.steps,
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        seed=config.seed,
        targets=config.model.block_size,
        device=config.device,
        resume=config.resume,
        clip=config.optimizer.clip,
        max_skipped=config.optimizer.max_skipped,
        exact=config.elastic.exact,
        traffic=config.elastic.traffic,
        snapshot_interval=config.elastic.snapshot_interval,
        checkpoint_interval=config.checkpoint.interval,
        checkpoint_keep=config.checkpoint.keep,
        checkpoint_dir=config.checkpoint.dir,
        evaluate_interval=config.evaluate.interval,
        grace_seconds=config.elastic.grace_seconds,
        timeout_seconds=config.elastic.timeout_seconds,
        observe_interval=config.observe.interval,
        tensorboard=config.observe.tensorboard,
    )


def merged_micro_batches(config: TrainConfig, world: World) -> int:
    """How many micro-batches go through the model together, as one larger one; more than one only on a CPU.

    On a CPU small micro-batches are slow. Merging changes the order of float sums, so it is not
    done in exact mode. Nor is it with dropout, since each micro-batch has its own random numbers;
    nor on a GPU, since the user chose the micro-batch for its memory; nor with a compiled model,
    which has one shape.
    """
    if not is_host(world.device) or config.elastic.exact or config.model.dropout > 0 or config.compile:
        return 1
    return max(1, MERGED_TOKENS // (config.micro_batch * config.model.block_size))


def loss_function(
    model: GPT, config: TrainConfig, dtype: torch.dtype, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function of (tokens, targets): the sum of the cross-entropy, in the run's dtype, compiled if the settings say so."""
    # Only the model is compiled, without the world, so that a membership change recompiles nothing.
    forward = torch.compile(model, dynamic=False, fullgraph=True) if config.compile else model

    def loss_sum(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return forward(tokens, targets)

    return loss_sum


def arithmetic(
    config: TrainConfig, meta: Meta, model: GPT, order: Order, world: World, dtype: torch.dtype, restored: Restored
) -> list[str]:
    """The batch arithmetic and the step at which the run begins, in words."""
    shares = sorted({len(share(config.micro_batches, rank, world.size)) for rank in range(world.size)})
    per_rank = " or ".join(str(count) for count in shares)
    merged = merged_micro_batches(config, world)
    epochs = config.steps * config.global_batch / order.sequences
    return [
        f"model: {model.parameter_count():,} parameters, vocabulary {config.model.vocab_size:,};"
        f" {str(dtype).removeprefix('torch.')} on {world.device.type}",
        f"data: {meta.splits['train'].tokens:,} training tokens in {order.sequences:,} sequences of {config.model.block_size};"
        f" {epochs:,.2f} epochs in {config.steps:,} steps",
        f"batch: {config.global_batch} sequences x {config.model.block_size} = {config.tokens_per_step:,} tokens a step,"
        f" in {config.micro_batches} micro-batches of {config.micro_batch}, {per_rank} on each of {world.size} workers"
        + (f", up to {merged} of them at a time" if merged > 1 and shares[-1] > 1 else ""),
        f"run: {shown(config.run_dir)}, {'from step ' + str(restored.step) if restored.step else 'from the start'}"
        + (f" ({restored.source})" if restored.step else ""),
    ]
