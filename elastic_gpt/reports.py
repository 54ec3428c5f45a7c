"""Step reports, and how they get from the device to the observers."""

import dataclasses
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from elastic_gpt.devices import to_host
from elastic_gpt.gradients import HALF, StepSums, not_finite
from elastic_gpt.order import sequence_hash
from elastic_gpt.world import World


@dataclass(frozen=True)
class StepReport:
    """The report of one step."""

    step: int
    """Updates done, this one included."""
    loss: float | None
    """Mean cross-entropy of the global batch before the update, nats per token; None for a skipped update."""
    lr: float
    grad_norm: float | None
    """Norm of the gradient before clipping; None for a skipped update."""
    tokens: int
    """Tokens seen since the start of the run."""
    tokens_per_second: float
    """Speed of all nodes together in this step."""
    mfu: float | None
    """Model flops utilization, 0 to 1, of the peak of all devices together; None if the peak is not known."""
    world_size: int
    sequence_hash: str
    """Hash of the ids of the sequences in the gradient, in order."""
    skipped: bool = False
    """Whether the update was left out, because the loss or the gradient was not finite."""

    def line(self) -> dict[str, Any]:
        """Its line in metrics.jsonl, which has `skipped` only if it is true."""
        fields = dataclasses.asdict(self)
        return fields if self.skipped else {name: fields[name] for name in fields if name != "skipped"}


class Observer:
    """Hears of a run on the first worker of its world; a subclass has those methods that it wants.

    Where the worker that is first changes, the new one's observers go on; they begin with the `joined` of its world.
    """

    def on_step(self, report: StepReport) -> None:
        """All ranks have done a step."""

    def on_evaluation(self, step: int, loss: float | None) -> None:
        """The validation loss; None: it is not finite."""

    def on_event(self, event: Mapping[str, Any]) -> None:
        """The ledger has got an event (`EVENTS` in contract.py): joined, lost, left, saved, skipped ..."""

    def on_message(self, text: str) -> None:
        """A line for a person."""

    def close(self) -> None:
        """The world has ended. In this process another one may begin, with another `joined`."""


class Reporter:
    """Reports each step to the observers, once all ranks are known to have done it, so that no death can undo it.

    On a GPU, reports are one step late, so that training does not wait for the device. Every rank
    makes reports: they go with its state, so that the next world can add the lines that a killed
    rank 0 did not write.

    Args:
        recent: the reports that came with the restored state, oldest first.
        keep: how many reports a snapshot carries.
        tokens_per_step: tokens in the global batch.
        flops_per_token: operations of the model, forward and backward.
        peak: operations per second of one device; None if not known.
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
        self.untold: deque[StepReport] = deque()
        self.clock = time.perf_counter()

    @property
    def skipped(self) -> int:
        """How many updates in a row were skipped, up to the newest report."""
        return len(list(itertools.takewhile(lambda report: report.get("skipped", False), reversed(self.recent))))

    def step(self, step: int, rate: float, sums: StepSums, norm: torch.Tensor) -> None:
        """Queue a step: updates done, learning rate, sums over all ranks, and the gradient's norm."""
        numbers = torch.cat([torch.stack([sums.loss, norm, not_finite(sums, norm)]), sums.stops, sums.ids.flatten()])
        self.pending.append((step, rate, to_host(numbers)))

    def drain(self, behind: int = 0) -> tuple[int, int]:
        """Make the reports of queued steps until `behind` are left. The observers get them when `all_did` is called.

        Returns how many workers stop after the last of these steps, and how many of them leave.
        """
        stops = leaves = 0.0
        while len(self.pending) > behind:
            step, rate, read = self.pending.popleft()
            loss, norm, skipped, stops, leaves, *ids = read()
            upper, lower = np.array(ids, dtype=np.int64).reshape(2, -1)
            now = time.perf_counter()
            speed, self.clock = self.tokens_per_step / (now - self.clock), now
            report = StepReport(
                step=step,
                loss=None if skipped else loss,
                lr=rate,
                grad_norm=None if skipped else norm,
                tokens=step * self.tokens_per_step,
                tokens_per_second=speed,
                mfu=speed * self.flops_per_token / (self.peak * self.world.size) if self.peak else None,
                world_size=self.world.size,
                sequence_hash=sequence_hash((upper << HALF) | lower),
                skipped=bool(skipped),
            )
            self.recent.append(report.line())
            self.untold.append(report)
        if self.world.size == 1:
            self.all_did()
        return int(stops), int(leaves)

    def all_did(self) -> None:
        """Give the reports to the observers. Call it after a collective that follows the steps: all ranks have come to it."""
        while self.untold:
            report = self.untold.popleft()
            for observer in self.observers:
                observer.on_step(report)

    def evaluation(self, step: int, loss: float) -> None:
        self.all_did()
        for observer in self.observers:
            observer.on_evaluation(step, loss if math.isfinite(loss) else None)
        self.clock = time.perf_counter()  # so that an evaluation does not count as time of the next step

    def say(self, text: str) -> None:
        for observer in self.observers:
            observer.on_message(text)

    def close(self) -> None:
        for observer in self.observers:
            observer.close()
