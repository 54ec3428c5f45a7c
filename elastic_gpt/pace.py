"""Who is slow: what each rank's micro-batches take, compared with the others'.

Each rank puts the time of its micro-batches into slots that travel with the gradient, so all know all of them and nothing
more is sent. Compared is the time for one micro-batch: shares of the global batch may differ. On a GPU the host does not
see how long its work takes, and nobody is named.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from elastic_gpt.order import share

WINDOW = 50  # steps that are judged together, by their median: one that was held up once is not slow
TIMES = 1.5  # as long as the others: slow
BACK = 1.25  # less than that: no longer slow


@dataclass(frozen=True)
class Slow:
    """A node that the others wait for, with the usual seconds for a micro-batch there and at the others."""

    node: str
    seconds: float
    others: float

    def __str__(self) -> str:
        mine, others = self.seconds * 1000, self.others * 1000
        return (
            f"node {self.node} is slow: {mine:.1f} ms a micro-batch, the others {others:.1f} ms; each step waits for it"
        )


class Pace:
    """The pace of a world's ranks.

    Args:
        nodes: of each rank, in order of rank.
        micro_batches: in a global batch.
        named: nodes that were found slow, in this world or one before; kept up to date.
    """

    def __init__(self, nodes: Sequence[str], micro_batches: int, named: set[str]) -> None:
        self.nodes, self.named = nodes, named
        self.shares = [share(micro_batches, rank, len(nodes)) for rank in range(len(nodes))]
        self.busy = [rank for rank, mine in enumerate(self.shares) if mine]
        self.window: list[list[float]] | None = None  # the first step in a world may hold a compilation

    def step(self, seconds: Sequence[float]) -> list[Slow]:
        """Hear what each micro-batch of a step took. Returns the nodes that were found slow with it and were not before."""
        if self.window is None:
            self.window = []
            return []
        if len(self.busy) < 2 or not seconds:
            return []
        self.window.append(
            [
                sum(seconds[self.shares[rank].start : self.shares[rank].stop]) / len(self.shares[rank])
                for rank in self.busy
            ]
        )
        if len(self.window) < WINDOW:
            return []
        usual = dict(zip(self.busy, map(statistics.median, zip(*self.window, strict=True)), strict=True))
        self.window = []
        slow: dict[str, Slow] = {}
        back = set(self.named)
        for rank, mine in usual.items():
            node = self.nodes[rank]
            others = statistics.median([usual[other] for other in self.busy if other != rank] or [mine])
            if mine > TIMES * others > 0:
                slow.setdefault(node, Slow(node, mine, others))
            if mine > BACK * others:
                back.discard(node)
        found = [one for node, one in slow.items() if node not in self.named]
        self.named.difference_update(back)
        self.named.update(slow)
        return found
