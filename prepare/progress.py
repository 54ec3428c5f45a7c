"""Shows how far a long work has come: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn

LINE_EVERY = 5.0
"""Seconds between two lines."""


@dataclass
class Meter:
    """Counts what was done so far. Whoever does the work updates it."""

    total: int
    """Bytes to read, as they are stored; 0 if that is not known."""
    show: Callable[["Meter"], None] = lambda _: None
    read: int = 0
    text: int = 0
    """Bytes of text that this run has encoded."""
    tokens: int = 0
    began: float = 0.0
    """When this run began to encode, by time.monotonic()."""
    skipped: int = 0
    """The part of `read` that an earlier run had done."""

    def advance(self, count: int) -> None:
        self.read += count
        self.show(self)

    def start(self) -> None:
        """Call it when the work of earlier runs has been checked and this run's own work begins."""
        self.began = time.monotonic()
        self.skipped = self.read

    def line(self) -> str:
        seconds = max(time.monotonic() - self.began, 1e-6)
        words = [f"{decimal(self.read)} of {decimal(self.total)}" if self.total else decimal(self.read)]
        speed = (self.read - self.skipped) / seconds
        words.append(f"{(self.text or self.read - self.skipped) / seconds / 1e6:.1f} MB/s")
        if self.tokens:
            words.append(f"{self.tokens / seconds / 1e6:.2f} Mtokens/s")
        if self.total and speed and seconds > 1:
            left = max(0, round((self.total - self.read) / speed))
            words.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        return ", ".join(words)


Phase = Callable[[str, int], AbstractContextManager[Meter]]
"""`with phase(title, total) as meter` shows the counts of the meter. `total`: bytes to read, 0 if not known."""


@contextmanager
def bars(title: str, total: int) -> Iterator[Meter]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[line]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(title, total=total or None, line="")
        last = 0.0

        def show(meter: Meter) -> None:
            nonlocal last
            if time.monotonic() - last > 0.1:
                last = time.monotonic()
                shown.update(task, completed=meter.read, line=meter.line())

        meter = Meter(total, show)
        meter.start()
        yield meter


@contextmanager
def lines(title: str, total: int) -> Iterator[Meter]:
    print(f"{title}: {decimal(total)}" if total else title, file=sys.stderr, flush=True)
    last = time.monotonic()

    def show(meter: Meter) -> None:
        nonlocal last
        if time.monotonic() - last > LINE_EVERY:
            last = time.monotonic()
            print(f"{title}: {meter.line()}", file=sys.stderr, flush=True)

    meter = Meter(total, show)
    meter.start()
    yield meter


def phase() -> Phase:
    """The kind of display that suits standard error: a bar, or lines."""
    return bars if sys.stderr.isatty() else lines
