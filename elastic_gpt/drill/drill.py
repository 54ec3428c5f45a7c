"""Kills and scales a run on purpose, then proves that the result is the same.

    elastic-gpt drill --events 20 --seed 7 --nodes 4

A random schedule of kills, preemptions, joins, master restarts and storage faults happens to local
nodes, under the real DLRover master and agents or plain torchrun. Then the same configuration
trains undisturbed. A table, JSON and a picture report whether the laws held.
"""

import dataclasses
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from elastic_gpt.drill.against import against
from elastic_gpt.drill.compare import compare, draw
from elastic_gpt.drill.faults import JOIN, LEAVE, PATIENCE, QUIET, SNAPSHOT_INTERVAL, Event, Faults, Stalled
from elastic_gpt.drill.systems import OTHERS, check
from elastic_gpt.drill.under_torchrun import TorchrunFaults, TorchrunJob
from elastic_gpt.ledger import PARTS, Ledger, account, read_metrics
from elastic_gpt.nodes.launch import MOST_LOCAL
from elastic_gpt.nodes.local import LocalJob
from elastic_gpt.nodes.mend import check_version
from prepare.frontdoor import DONE, FAILED, Parser, command, whole
from prepare.picture import quiet

GAP = (20, 60)  # steps from the end of an event to the next one
LAST_STEPS = 40  # after all events
CHECKPOINT_INTERVAL = 100
MARK = ".drill"  # a file that marks an output folder of ours, which may be deleted
FLOAT_TOLERANCE = 0.05  # nats; without exact mode runs drift apart by the order of float sums


class Under(NamedTuple):
    """DLRover or torchrun: how its jobs are started, and what can be done to them."""

    job: type[LocalJob]
    faults: type[Faults]


UNDER = {"dlrover": Under(LocalJob, Faults), "torchrun": Under(TorchrunJob, TorchrunFaults)}


def train(*words: str) -> None:
    """Run a command with one CPU thread, as each local node has. If it fails, end this process with its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "elastic_gpt.cli", *words],
        check=False,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        sys.exit(done.returncode if done.returncode > 0 else 128 - done.returncode)


def disturb(
    arguments: list[str], run: Path, happened: list[Event], *, under: Under, events: int, nodes: int, seed: int,
    say: Callable[[str], None]
) -> None:  # fmt: skip
    """Train on local nodes while random events happen to them. Appends the events to `happened`; at the end all leave."""
    dice = random.Random(seed)
    endless = ["train", *arguments, "--run-dir", str(run), "--steps=1000000"]
    with under.job(endless, least=1, most=nodes, threads=1, say=lambda _: None) as job:
        say(f"logs: {job.logs}")
        faults = under.faults(job, run, nodes, dice)
        for _ in range(nodes - 1):
            job.add_node()
        faults.wait(faults.together, "step of all nodes together")
        bag: list[str] = []
        for number in range(events):
            faults.reach(faults.steps() + dice.randint(*GAP))
            # Every kind comes once before any comes again. If a kind needs more nodes than there are, one joins instead.
            bag, possible = bag or list(faults.kinds), faults.possible()
            kind = dice.choice(
                [kind for kind in bag if kind in possible] or [kind for kind in possible if kind == JOIN] or possible
            )
            bag = [other for other in bag if other != kind]
            event = faults.do(kind)
            happened.append(event)
            charge(happened, faults.ledger.events())
            where = "" if event.node is None else f" (node {event.node})"
            say(
                f"{number + 1:>3}/{events}  step {event.step:>5}  {kind}{where}: {event.dropped} again, {event.seconds:.1f} s"
            )
        faults.reach(faults.steps() + GAP[0])
        happened.append(faults.do(LEAVE))


def charge(happened: list[Event], ledger: list[dict[str, Any]]) -> None:
    """Add what the ledger says of each recovery to the last event before it."""
    for event, end in zip(happened, [*(event.time for event in happened[1:]), math.inf], strict=True):
        after = [entry for entry in ledger if event.time <= entry["time"] < end]
        event.dropped = sum(entry["dropped"] for entry in after if entry["event"] == "restored")
        recovered = [entry for entry in after if entry["event"] == "recovered"]
        event.parts = {part: recovered[0][part] for part in PARTS} if recovered else {}


def finish(arguments: list[str], run: Path, *, under: Under, nodes: int, steps: int) -> None:
    """Resume the run as a new job, and train it to its end."""
    ending = ["train", *arguments, "--run-dir", str(run), f"--steps={steps}"]
    with under.job(ending, least=1, most=nodes, threads=1, say=lambda _: None) as job:
        for _ in range(nodes):
            job.add_node()
        deadline = time.monotonic() + PATIENCE
        while job.running():
            if time.monotonic() > deadline:
                raise Stalled(f"the job does not come to its end: see {job.logs}")
            time.sleep(0.05)
        if not job.finished():
            raise Stalled(f"no node saw the job finish: see {job.logs}")


def table(happened: list[Event]) -> Table:
    """A row for each kind of event. A new node takes seconds to start, and the others train on meanwhile."""
    drawn = Table(
        "event", "times", "done again, most", "allowed", "s to the next step, median", "most", "s stood still, median"
    )
    for kind in sorted({event.kind for event in happened}):
        these = [event for event in happened if event.kind == kind]
        most = max(event.dropped for event in these)
        row = [kind, str(len(these)), str(most), str(max(event.allowed for event in these))]
        if kind in QUIET:
            row.append("not interrupted")
        elif kind != LEAVE:
            seconds = [event.seconds for event in these]
            row += [f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"]
            if still := [sum(event.parts.values()) for event in these if event.parts]:  # a stop on purpose has none
                row.append(f"{statistics.median(still):.1f}")
        drawn.add_row(*row)
    return drawn


EXAMPLES = """\
examples:
  %(prog)s                                  20 events on up to 4 nodes, about 10 minutes
  %(prog)s --events 3 --nodes 2             a short one
  %(prog)s --under torchrun                 the same without DLRover: what torchrun survives
  %(prog)s --seed 8 --output-dir drill8     other events, beside the report of the drill before
  %(prog)s --against torchft --events 9     the same events for ElasticGPT and for others: what did each lose?

--against runs the systems one after the other on this machine: the same model, data and kills, and some seconds of training
between two events. torchrun restarts its workers from a file; dlrover is DLRover with its Flash Checkpoint; torchft (its
extra: pip install '.[torchft]' in a checkout) has replica groups that go on at the next step. Each was built for something
else, and that is said below the tables: read it before you compare.
"""


@command
def main(argv: Sequence[str] | None = None, prog: str = "elastic-gpt drill") -> int:
    """Run a drill. Returns exit code 1 if a law was broken."""
    parser = Parser(prog, description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--events", type=whole(1), default=20, metavar="N", help="how many things happen (default: 20)")
    parser.add_argument("--seed", type=int, default=7, metavar="N", help="of the schedule (default: 7)")
    most_nodes = whole(2, MOST_LOCAL)
    parser.add_argument("--nodes", type=most_nodes, default=4, metavar="N", help="the most at a time (default: 4)")
    parser.add_argument("--under", choices=UNDER, help="what keeps the nodes (default: dlrover)")
    parser.add_argument(
        "--against", choices=OTHERS, nargs="+", default=[],
        help="the same schedule for ElasticGPT and for others as they come, and what each lost by it; no laws are held",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=whole(1), metavar="SECONDS",
        help="with --against: how long a job may take to recover; then it is started anew (default: 120)",
    )  # fmt: skip
    parser.add_argument("--float", action="store_true", help="ordinary float sums instead of exact mode")
    parser.add_argument("--output-dir", type=Path, default=Path("drill"), metavar="DIR", help="(default: drill)")
    args = parser.parse_args(argv)
    if args.against and args.under:
        raise ValueError(f"--against has nodes of each system's own: leave out --under {args.under}")
    if args.limit and not args.against:
        raise ValueError(f"--limit {args.limit} is for --against: name a system, as in --against torchft")
    for name in args.against:
        check(name)
    with quiet():
        import matplotlib  # noqa: F401 - what is not installed is told before the work, not after it
    import torch  # noqa: F401

    under = args.under or "dlrover"
    if under == "dlrover":
        check_version()

    # --- an output folder without the files of an older drill
    out: Path = args.output_dir
    run, undisturbed, report = out / "run", out / "undisturbed", out / "report.json"
    if out.exists() and not (out / MARK).exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} is not a drill's folder: name a new one with --output-dir")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()
    for old in (run, undisturbed):
        shutil.rmtree(old, ignore_errors=True)
    report.unlink(missing_ok=True)

    train("prepare", "--sample", "--tokenizer", "char", "--output-dir", str(out / "data"))
    if args.against:
        against(
            list(dict.fromkeys(args.against)),
            out / "data",
            out,
            events=args.events,
            nodes=args.nodes,
            seed=args.seed,
            exact=not args.float,
            limit=args.limit or 120,
            train=train,
        )
        return DONE

    # --- the run that is disturbed
    arguments = [
        *("debug_cpu", "--data.dir", str(out / "data"), "--optimizer.decay-steps=1000"),
        *("--device=cpu", "--model.dropout=0.1", f"--elastic.exact={not args.float}", "--observe.tensorboard=false"),
        *("--evaluate.interval=0", f"--checkpoint.interval={CHECKPOINT_INTERVAL}"),
        f"--elastic.snapshot-interval={SNAPSHOT_INTERVAL}",
    ]
    print(f"{args.events} events on up to {args.nodes} nodes, seed {args.seed}", flush=True)
    happened: list[Event] = []
    found: dict[str, Any] = {"seed": args.seed, "under": under, "nodes": args.nodes, "exact": not args.float}
    started = time.monotonic()
    try:
        disturb(
            arguments,
            run,
            happened,
            under=UNDER[under],
            events=args.events,
            nodes=args.nodes,
            seed=args.seed,
            say=lambda line: print(line, flush=True),
        )
        took = time.monotonic() - started
        steps = len(read_metrics(run)) + LAST_STEPS
        print(f"all nodes left; a new job takes the run up and ends it at step {steps}", flush=True)
        finish(arguments, run, under=UNDER[under], nodes=args.nodes - 1, steps=steps)
    except Stalled as error:
        print(f"LAW BROKEN: {error}")
        found |= {"broken": str(error), "events": [dataclasses.asdict(event) for event in happened]}
        report.write_text(json.dumps(found, indent=1))
        return FAILED
    # --- the same run undisturbed, and whether the laws held
    print("the same configuration, undisturbed, in one process", flush=True)
    train("train", *arguments, "--run-dir", str(undisturbed), f"--steps={steps}")

    same, cost = compare(run, undisturbed), account(run)
    charge(happened, Ledger(run).events())
    laws = {
        "each step once in the kept history": same.same_steps,
        "the same sequences at every step": same.same_sequences,
        "no event cost more than its law allows": all(event.dropped <= event.allowed for event in happened)
        and sum(event.dropped for event in happened) == cost.dropped,
        "no process outlives its node": not any(event.orphans for event in happened),
        f"losses equal {'up to float sums' if args.float else 'bit for bit'}": same.loss_difference
        <= (FLOAT_TOLERANCE if args.float else 0.0),
    } | ({} if args.float else {"parameters equal bit for bit": same.same_parameters})
    # --- the report
    Console(width=None if sys.stdout.isatty() else 140).print(table(happened))
    for law, held in laws.items():
        print(f"{'held  ' if held else 'BROKEN'}  {law}")
    print(
        f"largest loss difference {same.loss_difference:.2g} over {cost.steps} steps; {cost.dropped} steps done again;"
        f" goodput {cost.goodput:.1%} with an event every {took / args.events:.0f} s"
    )
    found |= {
        "laws": laws,
        "comparison": dataclasses.asdict(same),
        "account": dataclasses.asdict(cost) | {"goodput": cost.goodput},
        "events": [dataclasses.asdict(event) for event in happened],
    }
    report.write_text(json.dumps(found, indent=1))
    draw(run, undisturbed, out / "drill.png")
    print(f"report: {report}, picture: {out / 'drill.png'}")
    return DONE if all(laws.values()) else FAILED
