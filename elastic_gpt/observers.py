"""Observers receive a report of each step. They all run on the first worker of a world.

console        a progress bar on a terminal, plain lines elsewhere
progress       in a pod: a line for the Kubernetes client (contract.py)
metrics.jsonl  one line for each step; after a restore, steps that are done again replace their old lines
tensorboard    the same numbers as curves
"""

import contextlib
import io
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from elastic_gpt import contract
from elastic_gpt.ledger import Ledger, strict_json
from elastic_gpt.mirror import Follower, mirror_of
from elastic_gpt.reports import Observer, StepReport

BLOCK = 1 << 16  # bytes of metrics.jsonl that are read together


class ConsoleObserver(Observer):
    """Progress for a person: a bar on a terminal, elsewhere a line every `interval` steps."""

    def __init__(self, steps: int, start: int, interval: int) -> None:
        self.steps, self.interval = steps, interval
        self.since, self.start = time.monotonic(), start
        self.validation = ""
        self.speeds: deque[float] = deque(maxlen=interval)
        self.bar: Progress | None = None
        if sys.stdout.isatty():
            self.bar = Progress(
                TextColumn("step {task.completed:,}/{task.total:,}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=Console(),
                refresh_per_second=4,
            )
            self.task = self.bar.add_task("", total=steps, completed=start)
            self.bar.start()

    def on_step(self, report: StepReport) -> None:
        utilization = f" · MFU {report.mfu:.1%}" if report.mfu is not None else ""
        self.speeds.append(report.tokens_per_second)
        speed = len(self.speeds) / sum(1 / one for one in self.speeds)  # mean over the last steps
        loss = math.nan if report.loss is None else report.loss
        line = f"loss {loss:.4f}{self.validation} · {speed:,.0f} tokens/s{utilization}"
        if report.skipped:
            self.on_message(f"step {report.step}: loss or gradient is not finite, the update is skipped")
        if self.bar:
            self.bar.update(self.task, completed=report.step, description=f"{line} · {report.world_size} workers")
        elif report.step % self.interval == 0 or report.step == self.steps:
            done = report.step - self.start
            norm = "" if report.grad_norm is None else f" · norm {report.grad_norm:.3f}"
            left = (self.steps - report.step) * (time.monotonic() - self.since) / max(1, done)
            print(
                f"step {report.step}/{self.steps} · {line} · lr {report.lr:.2e}{norm}"
                f" · {report.world_size} workers · {_duration(left)} left",
                flush=True,
            )

    def on_evaluation(self, step: int, loss: float | None) -> None:
        if loss is None:
            self.on_message(f"step {step}: the validation loss is not finite")
            return
        self.validation = f" · val {loss:.4f}"
        self.on_message(f"step {step}: validation loss {loss:.4f}")

    def on_message(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


class ProgressObserver(Observer):
    """Tells programs how far training is, when a world begins and every `interval` steps: in its output, and in a file.

    Args:
        start: updates done in the restored state.
        workers: number of workers in this world.
        file: the file that the agent passes on to the master. It always has one whole line.
        slow: the nodes that the others wait for, kept up to date (pace.py).
    """

    def __init__(
        self, steps: int, start: int, interval: int, *, workers: int, file: Path, slow: Collection[str] = ()
    ) -> None:
        self.steps, self.interval, self.file, self.slow = steps, interval, file, slow
        self.told = (start, time.monotonic())
        self.last: StepReport | None = None
        self._tell(
            contract.Progress(time=time.time(), step=start, steps=steps, workers=workers, slow=tuple(sorted(slow)))
        )

    def on_step(self, report: StepReport) -> None:
        self.last = report
        if report.step % self.interval == 0 or report.step == self.steps:
            self._report(report)

    def _report(self, report: StepReport) -> None:
        (before, since), self.told = self.told, (report.step, time.monotonic())
        each = (self.told[1] - since) / max(1, report.step - before)  # seconds per step since the last line
        self._tell(
            contract.Progress(
                time=time.time(),
                step=report.step,
                steps=self.steps,
                loss=report.loss,
                tokens_per_second=report.tokens / report.step / each if each else None,
                workers=report.world_size,
                seconds_left=(self.steps - report.step) * each,
                slow=tuple(sorted(self.slow)),
            )
        )

    def close(self) -> None:
        if self.last and self.last.step != self.told[0]:  # the world ends between two lines
            self._report(self.last)

    def _tell(self, progress: contract.Progress) -> None:
        line = progress.to_line()
        print(line, flush=True)
        aside = self.file.with_suffix(".new")
        with contextlib.suppress(OSError):  # the disk is full, but the line is in the log
            aside.write_text(line)
            aside.replace(self.file)


class MetricsObserver(Observer):
    """RUN/metrics.jsonl, with one line for each step of the kept history.

    Args:
        step: updates done in the restored state; later lines are of a lost world, and are cut off.
        reports: step reports that came with the state; those that the file lacks are added.
        lag: most lines that may be missing on an object store.
    """

    def __init__(self, path: Path, step: int, reports: list[dict[str, Any]], lag: int = 1) -> None:
        self.last_step = path.stat().st_mtime if path.exists() else None  # when the last line was written
        self.file = path.open("ab+", buffering=0)
        kept = end = self.dropped = 0
        for start, line in _from_the_end(self.file):  # a long run's file is not read whole at each change of members
            number = _step(line)
            if number is not None and number <= step:
                kept, end = number, start + len(line)
                break
            self.dropped += 1
        self.file.truncate(end)
        self.follower = None
        if mirror := mirror_of(path):
            mirror.cut(path.name, end)
            self.follower = Follower(mirror, path.name, lag)
        self.end, self.waiting = end, b""  # bytes of whole lines; lines that a full disk did not take
        reports = [report for report in reports if kept < report["step"] <= step]
        if kept < step and (not reports or reports[0]["step"] > kept + 1):
            upto = reports[0]["step"] - 1 if reports else step
            print(f"warning: {path} lacks the steps {kept + 1} to {upto}", file=sys.stderr, flush=True)
        if self.follower:
            self.follower.grown(end)  # no new line, but the store has to be cut as well
        for report in reports:
            self._write(report)

    def on_step(self, report: StepReport) -> None:
        self._write(report.line())

    def close(self) -> None:
        if self.waiting:
            print(f"warning: a full disk cost lines of {self.file.name}", file=sys.stderr, flush=True)
        self.file.close()
        if self.follower:
            self.follower.close()

    def _write(self, report: dict[str, Any]) -> None:
        """Append a line. If the disk is full it waits in memory, and training goes on."""
        lines = self.waiting + (strict_json(report) + "\n").encode()
        try:
            written = self.file.write(lines)
        except OSError:
            written = 0
        if written == len(lines):
            self.end, self.waiting = self.end + written, b""
            if self.follower:
                self.follower.grown(self.end)
            return
        if not self.waiting:
            print(
                f"WARNING: {self.file.name} cannot be written; training goes on, make room", file=sys.stderr, flush=True
            )
        self.waiting = lines
        with contextlib.suppress(OSError):
            self.file.truncate(self.end)


class LedgerObserver(Observer):
    """Writes the updates that were skipped to RUN/ledger.jsonl."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def on_step(self, report: StepReport) -> None:
        if report.skipped:
            self.ledger.write("skipped", step=report.step)

    def on_evaluation(self, step: int, loss: float | None) -> None:
        self.ledger.write("evaluated", step=step, loss=loss)


class TensorBoardObserver(Observer):
    """RUN/tensorboard: the same numbers as curves."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import, and only rank 0 needs it

        # purge_step hides what a lost world wrote after the restored step.
        self.writer = SummaryWriter(folder, purge_step=step + 1)

    def on_step(self, report: StepReport) -> None:
        for name in ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "world_size"):
            if (value := getattr(report, name)) is not None:
                self.writer.add_scalar(f"train/{name}", value, report.step)

    def on_evaluation(self, step: int, loss: float | None) -> None:
        if loss is not None:
            self.writer.add_scalar("validation/loss", loss, step)

    def close(self) -> None:
        self.writer.close()


def _from_the_end(file: io.RawIOBase) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, the last one first: where each begins, and its content. No more is read than is asked for."""
    block = start = file.seek(0, os.SEEK_END)
    rest = b""  # of a line that begins in an earlier block
    while block:
        size = min(BLOCK, block)
        block = file.seek(block - size)
        rest, *lines = (file.read(size) + rest).splitlines(keepends=True)
        for line in reversed(lines):
            start -= len(line)
            yield start, line
    if rest:
        yield 0, rest


def _step(line: bytes) -> int | None:
    """The step of a line of metrics; None for a half line that a killed writer left."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
