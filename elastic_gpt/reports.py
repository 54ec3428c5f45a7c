"""What is known of a step, and the way from the device to the observers."""

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
    """What is known of one step."""

    step: int
    """Updates done, this one included."""
    loss: float | None
    """Mean cross-entropy of the global batch before the update, nats a token; None for a skipped update."""
    lr: float
    grad_norm: float | None
    """Before clipping; None for a skipped update."""
    tokens: int
    """Seen since the start of the run."""
    tokens_per_second: float
    """Of all nodes together, over this step."""
    mfu: float | None
    """Model flops utilization: 0 to 1, of the peak of all devices together; None where the peak is not known."""
    world_size: int
    sequence_hash: str
    """Of the ids of the sequences that went into the gradient, in order."""
    skipped: bool = False
    """Whether the update was left out, because the loss or the gradient was not finite."""

    def line(self) -> dict[str, Any]:
        """As metrics.jsonl has it: `skipped` stands there only where it is true."""
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
    """Reports each step to the observers, once it is known that all ranks have done it: then no death of one can undo it.

    On a GPU reports are made one step late, so that nobody waits for the device. Every rank makes them: who goes on from this
    rank's state has the recent ones, and they fill what a killed rank 0 did not write.

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
        self.untold: deque[StepReport] = deque()
        self.clock = time.perf_counter()

    @property
    def skipped(self) -> int:
        """How many updates in a row were skipped, up to the newest report."""
        return len(list(itertools.takewhile(lambda report: report.get("skipped", False), reversed(self.recent))))

    def step(self, step: int, rate: float, sums: StepSums, norm: torch.Tensor) -> None:
        """Queue a step: updates done, learning rate, and what the ranks found together."""
        numbers = torch.cat([torch.stack([sums.loss, norm, not_finite(sums, norm)]), sums.stops, sums.ids.flatten()])
        self.pending.append((step, rate, to_host(numbers)))

    def drain(self, behind: int = 0) -> tuple[int, int]:
        """Make the reports of queued steps until `behind` are left; the observers get them when `all_did` is called.

        Returns how many workers stop after the last, and how many of them leave.
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
        """Tell the observers the reports there are. A collective after these steps has ended: each rank came to it."""
        while self.untold:
            report = self.untold.popleft()
            for observer in self.observers:
                observer.on_step(report)

    def evaluation(self, step: int, loss: float) -> None:
        self.all_did()
        for observer in self.observers:
            observer.on_evaluation(step, loss if math.isfinite(loss) else None)
        self.clock = time.perf_counter()  # an evaluation is not part of the next step's time

    def say(self, text: str) -> None:
        for observer in self.observers:
            observer.on_message(text)

    def close(self) -> None:
        for observer in self.observers:
            observer.close()
