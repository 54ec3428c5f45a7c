"""Takes over the newer checkpoints of a run that is still training."""

import asyncio
import sys
from pathlib import Path

import torch

from elastic_gpt.checkpoint import Checkpoints
from elastic_gpt.state import broken
from model_zoo.nanogpt.model import GPT, GPTConfig
from model_zoo.nanogpt.serving.scheduler import Scheduler

POLL_SECONDS = 2.0


async def follow(place: Path | str, config: GPTConfig, device: torch.device, scheduler: Scheduler) -> None:
    """Give each newer checkpoint in `place` to `scheduler`, for ever. One that cannot be read is tried again."""
    checkpoints = Checkpoints(place)
    told = ""
    while True:
        await asyncio.sleep(POLL_SECONDS)
        try:
            found = await asyncio.to_thread(_newer, checkpoints, scheduler.step, config, device)
        except (OSError, ValueError) as error:
            if told != (told := str(error)):
                print(f"warning: no newer checkpoint is taken from {place}: {error}", file=sys.stderr, flush=True)
            continue
        told = ""
        if found:
            scheduler.replace(*found)
            print(f"model of step {found[1]}", file=sys.stderr, flush=True)


def _newer(
    checkpoints: Checkpoints, step: int | None, config: GPTConfig, device: torch.device
) -> tuple[GPT, int] | None:
    """The newest model and its step; None if that is `step`. Raises OSError or ValueError."""
    newest = max(checkpoints.steps(), default=step)
    if newest is None or newest == step:
        return None
    state = {name.removeprefix("model."): tensor for name, tensor in checkpoints.read(newest, "model").items()}
    if name := broken(state):
        raise ValueError(f"step {newest} is of a broken model, {name} is not finite")
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(state, assign=True)
    return model.to(device).eval(), newest
