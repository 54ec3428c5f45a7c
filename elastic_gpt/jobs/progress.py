"""How far training is, from the lines in logs that are made for programs (contract.py)."""

import math
from collections.abc import Iterable

from elastic_gpt.contract import Progress
from elastic_gpt.jobs.words import count


def newest(lines: Iterable[str]) -> Progress | None:
    """The newest progress in lines of any logs, by the time in each line."""
    found = [one for entry in lines if (one := Progress.from_line(entry))]
    return max(found, key=lambda one: one.time, default=None)


def words(progress: Progress) -> str:
    """The progress in words."""
    parts = [f"step {progress.step:,}/{progress.steps:,}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if progress.workers:
        parts.append(count(progress.workers, "worker"))
    if progress.slow:
        parts.append(f"waits for {', '.join(progress.slow)}")
    if progress.seconds_left is not None and math.isfinite(progress.seconds_left) and progress.step < progress.steps:
        minutes, seconds = divmod(int(progress.seconds_left), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append((f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}") + " left")
    return " · ".join(parts)
