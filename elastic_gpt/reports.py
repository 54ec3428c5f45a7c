"""What is known of a step, and the way from the device to the observers."""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from elastic_gpt.gradients import HALF, StepSums
from elastic_gpt.order import sequence_hash
from elastic_gpt.world import World

# Dense matrix-product peaks without sparsity, operations a second at 16 bits, from the makers' data sheets.
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}


@dataclass(frozen=True)
class StepReport:
    """What is known of one step."""

    step: int
    """Updates done, this one included."""
    loss: float
    """Mean cross-entropy of the global batch before the update, nats a token."""
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Seen since the start of the run."""
    tokens_per_second: float
    """Of all nodes together, over this step."""
    mfu: float | None
    """Model flops utilization: 0 to 1, of the peak of all devices together; None where the peak is not known."""
    world_size: int
    sequence_hash: str
    """Of the ids of the sequences that went into the gradient, in order."""


class Observer(Protocol):
    """Receives a report of each step."""

    def on_step(self, report: StepReport) -> None: ...
    def on_evaluation(self, step: int, loss: float) -> None: ...
    def on_message(self, text: str) -> None: ...
    def close(self) -> None: ...


class Reporter:
    """Reports each step to the observers, on a GPU one step late so that it never waits for the device.

    Every rank makes the reports: a snapshot carries the recent ones, and they fill what a killed rank 0 did not write.

    Args:
        recent: the reports that came with the restored state, oldest first.
        keep: how many reports a snapshot carries.
        tokens_per_step: of the global batch.
        flops_per_token: of the model, forward and backward.
        peak: of one device, operations a second; None where it is not known.
    """

    def __init__(
        self,
        observers: Sequence[Observer],
        world: World,
        *,
        recent: Sequence[dict[str, Any]],
        keep: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak: float | None,
    ) -> None:
        self.observers, self.world = observers, world
        self.recent: deque[dict[str, Any]] = deque(recent, maxlen=keep)
        self.tokens_per_step, self.flops_per_token, self.peak = tokens_per_step, flops_per_token, peak
        self.pending: deque[tuple[int, float, Callable[[], list[float]]]] = deque()
        self.clock = time.perf_counter()

    def step(self, step: int, rate: float, sums: StepSums, norm: torch.Tensor) -> None:
        """Queue a step: updates done, learning rate, and what the ranks found together."""
        numbers = torch.cat([torch.stack([sums.loss, norm]), sums.stops, sums.ids.flatten()])
        self.pending.append((step, rate, _to_host(numbers)))

    def drain(self, behind: int = 0) -> tuple[int, int]:
        """Report queued steps until `behind` are left. Returns how many workers stop after the last, and how many leave."""
        stops = leaves = 0.0
        while len(self.pending) > behind:
            step, rate, read = self.pending.popleft()
            loss, norm, stops, leaves, *ids = read()
            upper, lower = np.array(ids, dtype=np.int64).reshape(2, -1)
            now = time.perf_counter()
            speed, self.clock = self.tokens_per_step / (now - self.clock), now
            report = StepReport(
                step=step,
                loss=loss,
                lr=rate,
                grad_norm=norm,
                tokens=step * self.tokens_per_step,
                tokens_per_second=speed,
                mfu=speed * self.flops_per_token / (self.peak * self.world.size) if self.peak else None,
                world_size=self.world.size,
                sequence_hash=sequence_hash((upper << HALF) | lower),
            )
            self.recent.append(dataclasses.asdict(report))
            for observer in self.observers:
                observer.on_step(report)
        return int(stops), int(leaves)

    def evaluation(self, step: int, loss: float) -> None:
        for observer in self.observers:
            observer.on_evaluation(step, loss)
        self.clock = time.perf_counter()  # an evaluation is no part of the next step's time

    def say(self, text: str) -> None:
        for observer in self.observers:
            observer.on_message(text)

    def close(self) -> None:
        for observer in self.observers:
            observer.close()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's known peak for products in `dtype`, operations a second; None where it is not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((peak for name, peak in PEAKS.items() if name in words), None)


def _to_host(values: torch.Tensor) -> Callable[[], list[float]]:
    """Start copying a small tensor to the host; the returned function waits for that copy alone, not for what follows."""
    if values.device.type != "cuda":
        numbers: list[float] = values.tolist()
        return lambda: numbers
    host = torch.empty_like(values, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return list(np.asarray(host).tolist())

    return read
