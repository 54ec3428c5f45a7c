"""What the loss and the coming of nodes costs a run: seconds from the event to the next step, and steps done again.

    python benchmarks/recovery.py [--times 10]

Three local nodes, one worker with one CPU thread each, `debug_cpu` under the real DLRover master and agents. Each round kills a
worker, a node and rank 0's node, sends SIGTERM to one, restarts the master, kills a worker right after that, and lets a node
join after each that went; each event strikes at some moment between two saves. Prints the medians beside the goals and beside
what was recorded before survivors stayed alive (docs/BENCHMARKS.md). A round takes about a minute. Others beside it:
`elastic-gpt drill --against`.
"""

import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from elastic_gpt.drill.against import FIRST, MASTER, NODE, PREEMPT, WORKER, Planned, disturb
from elastic_gpt.drill.faults import JOIN
from elastic_gpt.drill.measures import Cost, costs
from elastic_gpt.drill.systems import Ours
from elastic_gpt.ledger import PARTS, Ledger
from prepare.frontdoor import Parser, whole

NODES = 3
ROUND = (NODE, JOIN, WORKER, FIRST, JOIN, PREEMPT, JOIN, MASTER, WORKER)
SOON = f"{WORKER}, right after a master's restart"  # when that still waits for nodes which it may not know
GAP_SECONDS = (1.0, 2.0)
LIMIT = 120.0


class Goal(NamedTuple):
    """What is aimed at, and what was."""

    seconds: float
    """To the next step; of a join and of a master, for which training stands still."""
    before: str


GOALS = {
    WORKER: Goal(0.5, "1.1 s, 6"),
    SOON: Goal(0.5, "7.9 s, 5"),
    NODE: Goal(0.5, "2.2 s, 6"),
    FIRST: Goal(0.5, "2.2 s, 6"),
    PREEMPT: Goal(0.5, "3.1 s, 0"),
    JOIN: Goal(0.2, "1.4 to 2.3 s, 0"),
    MASTER: Goal(0.0, "0 s, 0"),
}
STANDS_STILL = (JOIN, MASTER)  # others train on while a new node starts


def seconds_of(cost: Cost, since: float, until: float, events: Sequence[dict[str, Any]]) -> float:
    """What an event cost: to the end of the first recovery after it, or what that recovery took.

    Args:
        events: of the ledger, which knows a recovery more exactly than who looks at the steps.
    """
    recovered = [one for one in events if one["event"] == "recovered" and since <= one["time"] < until]
    if cost.kind == MASTER or not recovered:
        return cost.seconds if cost.kind in STANDS_STILL else float("inf")
    if cost.kind == JOIN:
        return sum(recovered[0][part] for part in PARTS)
    return float(recovered[0]["time"]) - since


def main() -> None:
    parser = Parser("recovery", description=__doc__)
    parser.add_argument("--times", type=whole(1), default=10, metavar="N", help="rounds (default: 10)")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="recovery-"))
    print(f"logs: {scratch}", flush=True)
    prepare = ["prepare", "--sample", "--tokenizer", "char", "--output-dir", str(scratch / "data")]
    subprocess.run([sys.executable, "-m", "elastic_gpt.cli", *prepare], check=True, stdout=subprocess.DEVNULL)
    dice = random.Random(1)
    plan = [Planned(kind, dice.uniform(*GAP_SECONDS)) for kind in ROUND * args.times]
    with Ours(scratch / "data", scratch, NODES) as job:
        struck, _, ended = disturb(job, plan, nodes=NODES, limit=LIMIT, say=lambda line: print(line, flush=True))
        done, events = job.done(), Ledger(job.run).events()
    ends = [*(event.time for event in struck), ended][1:]
    found: dict[str, list[tuple[float, int]]] = {kind: [] for kind in GOALS}
    for number, (event, cost, end) in enumerate(zip(struck, costs(done, struck, ended), ends, strict=True)):
        again = sum(one["dropped"] for one in events if one["event"] == "restored" and event.time <= one["time"] < end)
        kind = SOON if number and struck[number - 1].kind == MASTER else event.kind
        found[kind].append((seconds_of(cost, event.time, end, events), again))
    table = Table(
        "event", "times", "goal", "before", "median", "least to most", "steps again, most", "reached, to 0.1 s"
    )
    for kind, goal in GOALS.items():
        seconds, again = [one for one, _ in found[kind]], max(one for _, one in found[kind])
        median = statistics.median(seconds)
        table.add_row(
            kind + (": training stands still" if kind in STANDS_STILL else ""), str(len(seconds)),
            f"{goal.seconds:.1f} s, 0", goal.before, f"{median:.2f} s", f"{min(seconds):.2f} to {max(seconds):.2f}",
            str(again), "yes" if round(median, 1) <= goal.seconds and not again else "no",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print(f"{time.strftime('%d %B %Y')}, {sys.version.split()[0]}, {len(done)} steps")


if __name__ == "__main__":
    main()
