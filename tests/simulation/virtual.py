"""Virtual time: processes are generators that yield for how many seconds they sleep, and nothing else takes any time."""

import heapq
import itertools
from collections.abc import Callable, Generator
from typing import Any

Process = Generator[float, None, Any]


class Clock:
    """What is to happen, in order."""

    def __init__(self) -> None:
        self.now = 0.0  # seconds of a monotonic clock
        self.wall = 1e9  # what a wall clock is ahead of it; jumps
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + seconds, next(self._order), do))

    def run(self, until: float, stop: Callable[[], bool] = lambda: False) -> None:
        """Let happen what is due up to `until`, or until `stop`."""
        while self._due and self._due[0][0] <= until and not stop():
            self.now, _, do = heapq.heappop(self._due)
            do()
        if not stop():
            self.now = max(self.now, until)


class Machine:
    """Runs processes until it is switched off; may stand still for a while, as a stopped or starved machine does."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.alive = True
        self.still_until = 0.0

    def start(self, process: Process, held_up: Callable[[], float] = lambda: 0.0) -> None:
        """Run a process.

        Args:
            held_up: until when it does not go on, whatever it waits for, while the machine does.
        """

        def step() -> None:
            if not self.alive:
                return
            if (until := max(self.still_until, held_up())) > self.clock.now:
                self.clock.after(until - self.clock.now, step)
                return
            try:
                seconds = next(process)
            except StopIteration:
                return
            self.clock.after(seconds, step)

        self.clock.after(0.0, step)
