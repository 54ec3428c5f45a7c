"""Compares two runs of the same configuration, step by step: in figures and as a picture."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_gpt.ledger import Ledger, read_metrics
from prepare.picture import quiet


@dataclass(frozen=True)
class Comparison:
    """The result of comparing two runs of the same configuration, step by step."""

    same_steps: bool
    """Whether both have each step once, from the first to the last."""
    same_sequences: bool
    """Whether each step used the same sequences in the same order."""
    loss_difference: float
    """Largest difference of any step, nats per token; infinite if only one run skipped an update."""
    same_parameters: bool
    """Whether the last checkpoints are equal bit for bit."""


def compare(run: Path, undisturbed: Path) -> Comparison:
    mine, theirs = read_metrics(run), read_metrics(undisturbed)
    both = list(zip(mine, theirs, strict=False))
    last = [sorted(path.glob("checkpoints/step_*/model.safetensors"))[-1] for path in (run, undisturbed)]
    return Comparison(
        same_steps=[line["step"] for line in mine]
        == [line["step"] for line in theirs]
        == list(range(1, len(theirs) + 1)),
        same_sequences=all(a["sequence_hash"] == b["sequence_hash"] for a, b in both),
        loss_difference=max(_difference(a["loss"], b["loss"]) for a, b in both),
        same_parameters=last[0].read_bytes() == last[1].read_bytes(),
    )


def _difference(mine: float | None, theirs: float | None) -> float:
    """The difference of two losses; None is the loss of a skipped update."""
    if mine is None or theirs is None:
        return 0.0 if mine is theirs else math.inf
    found = abs(mine - theirs)
    return math.inf if math.isnan(found) else found  # version 0.1.0 wrote NaN, which max() would ignore


def _drawable(lines: list[dict[str, Any]]) -> list[float]:
    """The losses, with NaN (a gap in the curve) for a skipped update."""
    return [math.nan if line["loss"] is None else line["loss"] for line in lines]


def changes(run: Path) -> list[tuple[int, str]]:
    """The membership changes of a run: the step, and what happened in a few words."""
    found: list[tuple[int, str]] = []
    before: set[str] = set()
    for event in Ledger(run).events():
        if event["event"] == "joined":
            nodes = {name.partition("-node-")[2] or name for name in event["nodes"]}
            parted, new, before = before - nodes, nodes - before, nodes
        if event["event"] == "restored" and event["step"]:
            what = [f"-{node}" for node in sorted(parted)] + [f"+{node}" for node in sorted(new)]
            found.append((event["step"], " ".join([*what, f"({event['dropped']})"])))
    return found


@quiet()
def draw(run: Path, undisturbed: Path, path: Path) -> None:
    """Draw both loss curves, the number of workers, and the membership changes."""
    import matplotlib.pyplot as plt  # takes a second to import, and may not be installed where only ledgers are read

    mine, theirs = read_metrics(run), read_metrics(undisturbed)
    steps = [line["step"] for line in mine]
    figure, (loss, world) = plt.subplots(
        2, 1, figsize=(11, 6.5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    loss.plot(
        [line["step"] for line in theirs],
        _drawable(theirs),
        color="#b8c4d6", linewidth=5, label="undisturbed, 1 process",
    )  # fmt: skip
    loss.plot(steps, _drawable(mine), color="#c8553d", linewidth=1, label="elastic, nodes come and go")
    difference = compare(run, undisturbed).loss_difference
    loss.set(
        ylabel="training loss (nats a token)",
        title=f"The loss curve does not notice: largest difference {difference:.1g}",
    )
    loss.legend(loc="center right")
    world.step(steps, [line["world_size"] for line in mine], where="post", color="#33658a")
    most = max(line["world_size"] for line in mine)
    world.set(ylabel="workers", xlabel="step", ylim=(0, most + 0.5), yticks=range(most + 1))
    marks: dict[int, str] = {}
    for step, text in changes(run):
        marks[step] = f"{marks[step]}, then {text}" if step in marks else text
    for step, text in marks.items():
        for axis in (loss, world):
            axis.axvline(step, color="#888888", linewidth=0.8, linestyle=":")
        loss.annotate(
            text, (step, 0.98), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points",
            fontsize=8, color="#555555", rotation=90, verticalalignment="top",
        )  # fmt: skip
    world.annotate(
        "+n: node n joined; -n: it is gone; (k): k steps were done again",
        (0.01, 0.08), xycoords="axes fraction", fontsize=8, color="#555555",
    )  # fmt: skip
    figure.savefig(path, dpi=120)
    plt.close(figure)
