"""Takes over the newer checkpoints of a run that is still training."""

import asyncio
import sys
from pathlib import Path

import torch

from elastic_gpt.checkpoint import Checkpoints
from elastic_gpt.state import broken
from elastic_gpt.storage import Unreachable
from model_zoo.nanogpt.loading import Weights, build
from model_zoo.nanogpt.model import GPT, GPTConfig
from model_zoo.nanogpt.serving.scheduler import Scheduler

POLL_SECONDS = 2.0
Bad = dict[int, tuple[dict[str, str], str]]
"""Checkpoints that were not taken: what their files were like, and why not."""


async def follow(place: Path | str, config: GPTConfig, device: torch.device, scheduler: Scheduler) -> None:
    """Give each newer checkpoint in `place` to `scheduler`, for ever. A bad one is read again when it changes."""
    checkpoints = Checkpoints(place)
    told: list[str] = []
    bad: Bad = {}
    while True:
        await asyncio.sleep(POLL_SECONDS)
        found: tuple[GPT, int] | None = None
        problems: list[str] = []
        try:
            found = await asyncio.to_thread(_newer, checkpoints, scheduler.step, config, device, problems, bad)
        except Unreachable as error:
            problems.append(str(error))
        for problem in problems:
            if problem not in told:
                print(f"warning: a checkpoint in {place} is not taken: {problem}", file=sys.stderr, flush=True)
        told = problems
        if found:
            model, step = found
            scheduler.replace(model, step)
            print(f"model of step {step}", file=sys.stderr, flush=True)


def _newer(
    checkpoints: Checkpoints,
    current: int | None,
    config: GPTConfig,
    device: torch.device,
    problems: list[str],
    bad: Bad,
) -> tuple[GPT, int] | None:
    """The newest good model, on `device`, and its step; None if that is `current`, or there is none.

    What is wrong with newer ones is appended to `problems`. In `bad` it is kept what the files were like, so that they are not
    read again while they stay so. Raises Unreachable.
    """
    for step in reversed(checkpoints.steps()):
        if step == current:
            return None
        files = checkpoints.versions(step)
        if step in bad and bad[step][0] == files:
            problems.append(bad[step][1])
            continue
        try:
            tensors = checkpoints.read(step, "model")
            state = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
            if name := broken(state):
                raise ValueError(f"a broken model, {name} is not finite")
            return build(Weights(config, state, step, f"step {step}")).eval().to(device), step
        except Unreachable:
            raise
        except Exception as error:  # whatever there is in a damaged file, the one before it may be good
            problems.append(f"step {step}: {str(error) or type(error).__name__}")
            passing = isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError))
            if not passing and not isinstance(error.__cause__, OSError):
                bad[step] = files, problems[-1]
    return None
