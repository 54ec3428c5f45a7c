"""What a schedule of events cost a system, from the steps that it did: one arithmetic for all of them.

The *kept history* of a run has each step once: where a step is done again, what was done from there on before is lost.
"""

import bisect
import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from prepare.picture import quiet

LAST = 50  # steps at the end, over which a mean of losses is compared


@dataclass(frozen=True)
class Done:
    """A step that was done."""

    step: int
    """The first is 1."""
    time: float
    """When all of its workers had done it, seconds since 1970."""
    world: int
    """Workers that did it."""
    ids: tuple[int, ...]
    """The sequences that it used."""
    loss: float
    """Mean over them, nats a token."""


@dataclass
class Struck:
    """An event, as it happened to one system."""

    kind: str
    time: float
    """Seconds since 1970."""
    settled: float | None = None
    """When all nodes that were there trained together again; None: they did not."""
    note: str = ""
    """Why not: then somebody started the job anew."""


@dataclass(frozen=True)
class Cost:
    """What one event cost."""

    kind: str
    seconds: float
    """Longest time between two steps of the kept history around it, above the usual time of a step."""
    again: int
    """Steps that had been done before, and were done again."""
    settled: float | None
    """Seconds until all nodes trained together again; None: not without help."""
    note: str


@dataclass(frozen=True)
class Account:
    """What a run of a system came to."""

    costs: tuple[Cost, ...]
    steps: int
    """In the kept history."""
    again: int
    skipped: int
    """Uses of sequences that the epochs that are over lack in the kept history: each should be used once an epoch."""
    repeated: int
    """Uses beyond one an epoch."""
    batch: tuple[int, int]
    """Least and most sequences that a step used."""
    largest_difference: float
    """Of the loss of any step from that of the same step undisturbed, nats a token."""
    last_difference: float
    """Of the mean loss of the last steps."""
    goodput: float
    """Time that the kept steps usually take over the time that went by, 0 to 1."""
    sequences_per_second: float
    """Of the kept history."""


def kept(done: Sequence[Done]) -> list[Done]:
    """The kept history of all that was done, in the order of time."""
    history: list[Done] = []
    for one in done:
        while history and history[-1].step >= one.step:
            history.pop()
        history.append(one)
    return history


def usual(history: Sequence[Done]) -> dict[int, float]:
    """Seconds that a step usually takes, by workers that do it."""
    took: dict[int, list[float]] = {}
    for before, one in itertools.pairwise(history):
        if before.world == one.world:
            took.setdefault(one.world, []).append(one.time - before.time)
    return {world: statistics.median(seconds) for world, seconds in took.items()}


def unbalanced(history: Sequence[Done], sequences: int) -> tuple[int, int]:
    """Uses skipped and uses repeated, of a data set in which each sequence is to be used once an epoch.

    After k epochs and a part of the next, each should have been used k or k + 1 times.
    """
    uses = Counter(sequence for one in history for sequence in one.ids)
    epochs, more = divmod(uses.total(), sequences)
    counts = [uses[sequence] for sequence in range(sequences)]
    most = epochs + (more > 0)
    return sum(max(0, epochs - count) for count in counts), sum(max(0, count - most) for count in counts)


def account(
    done: Sequence[Done],
    struck: Sequence[Struck],
    undisturbed: Sequence[Done],
    *,
    sequences: int,
    began: float,
    ended: float,
) -> Account:
    """Add up a run.

    Args:
        done: all steps, those that were lost too, in the order of time.
        undisturbed: the same training, to which nothing happened.
        sequences: in an epoch.
        began, ended: the time that counts, seconds since 1970: from when all nodes trained together for the first time.
    """
    history = kept([one for one in done if one.time <= ended])
    seconds = usual(history)
    during = [one for one in history if one.time >= began]
    losses = {one.step: one.loss for one in undisturbed}
    both = [(one.loss, losses[one.step]) for one in history if one.step in losses]
    sizes = [len(one.ids) for one in during if one.ids]
    took = ended - began
    return Account(
        costs=tuple(costs(done, struck, ended)),
        steps=len(history),
        again=_again(done, began, ended),
        skipped=(uneven := unbalanced(history, sequences))[0],
        repeated=uneven[1],
        batch=(min(sizes), max(sizes)),
        largest_difference=max(abs(mine - theirs) for mine, theirs in both),
        last_difference=abs(statistics.mean(mine - theirs for mine, theirs in both[-LAST:])),
        goodput=min(1.0, sum(seconds.get(one.world, 0.0) for one in during) / took),
        sequences_per_second=sum(map(len, (one.ids for one in during))) / took,
    )


def costs(done: Sequence[Done], struck: Sequence[Struck], ended: float) -> list[Cost]:
    """What each event cost, up to the next one or the end; arguments as `account` has them."""
    history = kept([one for one in done if one.time <= ended])
    a_step = statistics.median(usual(history).values() or [0.0])
    return [
        Cost(
            kind=event.kind,
            seconds=max(0.0, _longest_pause(history, event.time, event.settled or end, end) - a_step),
            again=_again(done, event.time, end),
            settled=None if event.settled is None else event.settled - event.time,
            note=event.note,
        )
        for event, end in zip(struck, [*(event.time for event in struck), ended][1:], strict=True)
    ]


def _longest_pause(history: Sequence[Done], start: float, settled: float, end: float) -> float:
    """Between two steps of the kept history, of which the second came after `start` and the first before `settled`."""
    times = [one.time for one in history]
    first = max(
        1, bisect.bisect_right(times, start)
    )  # the first step after the event; the pause began with the one before
    last = bisect.bisect_right(times, max(settled, start))
    pauses = [times[place] - times[place - 1] for place in range(first, min(last + 1, len(times)))]
    if not times or times[-1] <= start:  # nothing followed
        pauses.append(end - (times[-1] if times else start))
    return max(pauses, default=0.0)


def _again(done: Sequence[Done], start: float, end: float) -> int:
    """Steps done from `start` to `end` that had been done before."""
    highest = again = 0
    for one in done:
        again += start <= one.time < end and one.step <= highest
        highest = max(highest, one.step)
    return again


# --- as a person sees it ------------------------------------------------------------------------------------------------


def by_event(accounts: dict[str, Account]) -> Table:
    """A row for each kind of event: seconds and steps that it cost each system, medians."""
    drawn = Table("event", "times", *accounts)
    kinds = list(dict.fromkeys(cost.kind for found in accounts.values() for cost in found.costs))
    for kind in kinds:
        cells = []
        for found in accounts.values():
            cells.append(_cell([cost for cost in found.costs if cost.kind == kind]))
        times = max(sum(cost.kind == kind for cost in found.costs) for found in accounts.values())
        drawn.add_row(kind, str(times), *cells)
    return drawn


def _cell(costs: Sequence[Cost], notes: bool = True) -> str:
    """Medians of what one kind of event cost a system, and how often somebody had to start it anew."""
    if not costs:
        return "there is none"
    lost = [cost for cost in costs if cost.settled is None]
    text = (
        f"{statistics.median(cost.seconds for cost in costs):.1f} s, {statistics.median_high(c.again for c in costs)}"
    )
    return text + (f"; {len(lost)} of {len(costs)} by hand{f': {lost[0].note}' if notes else ''}" if lost else "")


def totals(accounts: dict[str, Account]) -> Table:
    """A row for each figure of a whole run."""
    drawn = Table("whole run", *accounts)
    rows = {
        "steps kept": lambda a: f"{a.steps:,}",
        "steps done again": lambda a: f"{a.again:,}",
        "started anew by hand": lambda a: str(sum(cost.settled is None for cost in a.costs)),
        "sequences skipped, repeated": lambda a: f"{a.skipped:,}, {a.repeated:,}",
        "sequences a step": lambda a: str(a.batch[0]) if a.batch[0] == a.batch[1] else f"{a.batch[0]} to {a.batch[1]}",
        "largest loss difference, nats": lambda a: f"{a.largest_difference:.2g}",
        f"difference of the last {LAST} steps' mean": lambda a: f"{a.last_difference:.2g}",
        "goodput": lambda a: f"{a.goodput:.1%}",
        "sequences a second": lambda a: f"{a.sequences_per_second:.0f}",
    }
    for name, cell in rows.items():
        drawn.add_row(name, *(cell(found) for found in accounts.values()))
    return drawn


@quiet()
def draw(accounts: dict[str, Account], histories: dict[str, tuple[float, list[Done]]], path: Path) -> None:
    """What each kind of event cost each system, and how far each came.

    Args:
        histories: of each system, when it began (seconds since 1970), and all steps.
    """
    import matplotlib.pyplot as plt

    colors = dict(zip(accounts, ("#c8553d", "#33658a", "#86a873", "#8d6a9f"), strict=False))
    kinds = list(dict.fromkeys(cost.kind for found in accounts.values() for cost in found.costs))
    figure, (bars, lines) = plt.subplots(
        1, 2, figsize=(13, 1.5 + 0.85 * len(kinds)), width_ratios=(3, 2), layout="constrained"
    )
    height, least = 0.8 / len(accounts), 0.02  # the axis begins there, for it is logarithmic
    for place, (name, found) in enumerate(accounts.items()):
        for row, kind in enumerate(kinds):
            these = [cost for cost in found.costs if cost.kind == kind]
            seconds = max(least, statistics.median([cost.seconds for cost in these] or [0.0]))
            y = row + (place - (len(accounts) - 1) / 2) * height
            hatch = "///" if any(cost.settled is None for cost in these) else None
            bars.barh(y, seconds, height * 0.92, color=colors[name], hatch=hatch, edgecolor="white")
            bars.text(seconds, y, f" {_cell(these, notes=False)}", fontsize=7, color="#444444", va="center")
        began, done = histories[name]
        label = f"{name}: goodput {found.goodput:.0%}"
        lines.plot([one.time - began for one in done], [one.step for one in done], color=colors[name], label=label)
    most = max((cost.seconds for found in accounts.values() for cost in found.costs), default=1.0)
    bars.set(xscale="log", xlim=(least, max(1.0, most) * 30), ylim=(len(kinds) - 0.5, -0.5), yticks=range(len(kinds)))
    bars.set_yticklabels(kinds)
    bars.set_xlabel("seconds without a step that was kept")
    bars.set_title("What an event costs: seconds, steps again (hatched: started anew by hand)", fontsize=10)
    lines.set(xlabel="seconds", ylabel="step", xlim=(0, None))
    lines.set_title("The same schedule: steps over time", fontsize=10)
    figure.legend(*lines.get_legend_handles_labels(), loc="outside lower center", ncols=len(accounts), fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
