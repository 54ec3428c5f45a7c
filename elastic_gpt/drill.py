"""Kill and scale on purpose, then prove that nothing changed.

    elastic-gpt drill --events 20 --seed 7 --nodes 4

A random schedule of kills, preemptions, joins, master restarts and storage faults on local nodes, under the real DLRover
master and agents; the same configuration undisturbed; and a report of whether the laws held, as a table, JSON and a picture.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from elastic_gpt.compare import compare, draw
from elastic_gpt.ledger import PARTS, Ledger, account
from elastic_gpt.local import LocalJob
from elastic_gpt.observers import read_metrics
from elastic_gpt.settings import fail

GAP = (20, 60)  # steps between an event and the first step after the one before
LAST_STEPS = 40  # after all events
SNAPSHOT_INTERVAL, CHECKPOINT_INTERVAL = 10, 100
PATIENCE = 120.0  # seconds without a step before the drill gives up: a hang is a broken law
FLOAT_TOLERANCE = 0.05  # nats; without exact mode runs drift apart by the order of float sums


class DrillError(RuntimeError):
    """The run stood still, or ended before its last step."""


@dataclass
class Event:
    """Something that was done to the job, and what came of it."""

    kind: str
    node: int | None
    step: int
    """Updates done when it was done."""
    allowed: int
    """Steps that the laws let it cost."""
    dropped: int = 0
    """Steps that had to be done again."""
    seconds: float = 0.0
    """From the event to the first step after it."""
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of the recovery, from the ledger."""


class Drill:
    """A job and the things that can be done to it.

    Args:
        job: started nodes.
        run: its run directory.
        dice: decides everything.
    """

    def __init__(self, job: LocalJob, run: Path, nodes: int, dice: random.Random) -> None:
        self.job, self.run, self.nodes, self.dice = job, run, nodes, dice
        self.ledger = Ledger(run)
        self.kinds: dict[str, Callable[[], tuple[int | None, int]]] = {
            "kill -9 of a worker": self.kill_worker,
            "kill -9 of a node": self.kill_node,
            "kill -9 of rank 0's node": self.kill_first,
            "SIGTERM to a node": self.preempt,
            "SIGTERM to all nodes": self.preempt_all,
            "kill -9 of all nodes": self.kill_all,
            "a node joins": self.join,
            "master killed, restarted": self.restart_master,
            "storage fault": self.storage_fault,
        }

    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def possible(self) -> list[str]:
        """Events that leave a node alive, or start one."""
        alive = len(self.job.running())
        few = {"kill -9 of a node", "kill -9 of rank 0's node", "SIGTERM to a node"} if alive < 2 else set()
        many = {"a node joins"} if alive >= self.nodes else set()
        return [kind for kind in self.kinds if kind not in few | many]

    def do(self, kind: str) -> Event:
        """Do it, and wait for the first step of the world that comes of it."""
        lives, done = self.ledger.lives(), self.steps()
        start = time.time()
        node, allowed = self.kinds[kind]()
        event = Event(kind, node, done, allowed)
        new_world = kind not in ("master killed, restarted", "storage fault")
        if new_world:
            self.wait(lambda: self.ledger.lives() > lives)
            found = [(e["event"], e) for e in self.ledger.events()[-200:] if e["time"] >= start]
            event.dropped = sum(e["dropped"] for name, e in found if name == "restored")
            self.wait(lambda: any(e["event"] == "recovered" and e["time"] >= start for e in self.ledger.events()))
            recovered = next(e for e in reversed(self.ledger.events()) if e["event"] == "recovered")
            event.seconds, event.parts = recovered["time"] - start, {part: recovered[part] for part in PARTS}
        else:
            self.wait(lambda: self.steps() > done + 5)
        return event

    def wait(self, condition: Callable[[], bool]) -> None:
        seen, since = self.steps(), time.monotonic()
        while not condition():
            if self.steps() != seen:
                seen, since = self.steps(), time.monotonic()
            if time.monotonic() - since > PATIENCE:
                raise DrillError(f"no step for {PATIENCE:.0f} s at step {seen}: see {self.job.logs}")
            time.sleep(0.02)

    def reach(self, step: int) -> None:
        self.wait(lambda: self.steps() >= step)

    def any_node(self) -> int:
        return self.dice.choice(self.job.running())

    def kill_worker(self) -> tuple[int | None, int]:
        node = self.any_node()
        for worker in self.job.workers_of(node):
            os.kill(worker, signal.SIGKILL)
        return node, SNAPSHOT_INTERVAL

    def kill_node(self) -> tuple[int | None, int]:
        node = self.any_node()
        self.job.kill(node)
        return node, SNAPSHOT_INTERVAL

    def kill_first(self) -> tuple[int | None, int]:
        node = min(self.job.running())  # DLRover gives rank 0 to the lowest
        self.job.kill(node)
        return node, SNAPSHOT_INTERVAL

    def preempt(self) -> tuple[int | None, int]:
        node = self.any_node()
        self.job.terminate(node)
        return node, 0

    def preempt_all(self) -> tuple[int | None, int]:
        nodes = self.job.running()
        for node in nodes:
            self.job.terminate(node)
            time.sleep(self.dice.random() / 2)
        self.replace(nodes)
        return None, 0

    def kill_all(self) -> tuple[int | None, int]:
        nodes = self.job.running()
        for node in nodes:
            self.job.kill(node)
        self.replace(nodes)
        return None, CHECKPOINT_INTERVAL

    def replace(self, nodes: list[int], start: bool = True) -> None:
        """Wait until the nodes are gone, and start as many others."""
        deadline = time.monotonic() + PATIENCE
        while set(self.job.running()) & set(nodes):
            if time.monotonic() > deadline:
                raise DrillError(f"a node does not leave: see {self.job.logs}")
            time.sleep(0.02)
        for _ in nodes if start else []:
            self.job.add_node()

    def join(self) -> tuple[int | None, int]:
        return self.job.add_node(), 0

    def restart_master(self) -> tuple[int | None, int]:
        self.job.kill_master()
        time.sleep(self.dice.random() * 2)
        self.job.start_master()
        return None, 0

    def storage_fault(self) -> tuple[int | None, int]:
        """For a while there is a file where the folder of checkpoints was."""
        folder, aside = self.run / "checkpoints", self.run / "checkpoints.aside"
        folder.mkdir(exist_ok=True)
        folder.rename(aside)
        folder.touch()
        try:
            done = self.steps()
            self.wait(lambda: self.steps() >= done + 15)
        finally:
            folder.unlink()
            aside.rename(folder)
        return None, 0


def train(*words: str) -> None:
    """A training in one process with one CPU thread, as each local node has."""
    subprocess.run(
        [sys.executable, "-m", "elastic_gpt.cli", *words],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def disturb(
    arguments: list[str], run: Path, *, events: int, nodes: int, seed: int, say: Callable[[str], None]
) -> list[Event]:
    """Train on local nodes while a random schedule of events happens to them; in the end all leave."""
    dice = random.Random(seed)
    happened: list[Event] = []
    endless = ["train", *arguments, "--run-dir", str(run), "--steps=1000000"]
    with LocalJob(endless, least=1, most=nodes, threads=1, say=lambda _: None) as job:
        say(f"logs: {job.logs}")
        drill = Drill(job, run, nodes, dice)
        for _ in range(nodes - 1):
            job.add_node()
        bag: list[str] = []
        for number in range(events):
            drill.reach(drill.steps() + dice.randint(*GAP))
            # Every kind comes up before one comes up again, as far as the nodes there are allow it.
            left = [kind for kind in bag if kind in drill.possible()] or drill.possible()
            kind = dice.choice(left)
            bag = [other for other in bag or list(drill.kinds) if other != kind]
            event = drill.do(kind)
            happened.append(event)
            where = "" if event.node is None else f" (node {event.node})"
            say(
                f"{number + 1:>3}/{events}  step {event.step:>5}  {kind}{where}: {event.dropped} again, {event.seconds:.1f} s"
            )
        drill.reach(drill.steps() + GAP[0])
        for node in job.running():
            job.terminate(node)
        drill.replace(job.running(), start=False)
    return happened


def finish(arguments: list[str], run: Path, *, nodes: int, steps: int) -> None:
    """Take the run up again as a new job, and train it to its end."""
    with LocalJob(["train", *arguments, "--run-dir", str(run), f"--steps={steps}"], least=1, most=nodes, threads=1,
                  say=lambda _: None) as job:  # fmt: skip
        for _ in range(nodes):
            job.add_node()
        deadline = time.monotonic() + PATIENCE
        while job.running():
            if time.monotonic() > deadline:
                raise DrillError(f"the job does not come to its end: see {job.logs}")
            time.sleep(0.05)
        if not job.finished():
            raise DrillError(f"no node saw the job finish: see {job.logs}")


def table(happened: list[Event]) -> Table:
    """A row for each kind of event. A new node needs seconds to start; the others train on until it is there."""
    drawn = Table(
        "event", "times", "done again, most", "allowed", "s to the next step, median", "most", "s stood still, median"
    )
    for kind in sorted({event.kind for event in happened}):
        these = [event for event in happened if event.kind == kind]
        most = max(event.dropped for event in these)
        row = [kind, str(len(these)), str(most), str(these[0].allowed)]
        if these[0].parts:
            seconds = [event.seconds for event in these]
            still = statistics.median(sum(event.parts.values()) for event in these)
            row += [f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}", f"{still:.1f}"]
        drawn.add_row(*(row if these[0].parts else [*row, "not interrupted"]))
    return drawn


def main(argv: Sequence[str] | None = None, prog: str = "elastic-gpt drill") -> int:
    """Run a drill. Exit code 1 if any law was broken."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20, metavar="N", help="how many things happen (default: 20)")
    parser.add_argument("--seed", type=int, default=7, metavar="N", help="of the schedule (default: 7)")
    parser.add_argument("--nodes", type=int, default=4, metavar="N", help="the most nodes at a time (default: 4)")
    parser.add_argument("--float", action="store_true", help="ordinary float sums instead of exact mode")
    parser.add_argument("--output-dir", type=Path, default=Path("drill"), metavar="DIR", help="(default: drill)")
    args = parser.parse_args(argv)
    if args.events < 1 or args.nodes < 2:
        return fail(ValueError("a drill needs --events of at least 1 and --nodes of at least 2"))
    out: Path = args.output_dir
    run, undisturbed = out / "run", out / "undisturbed"
    for old in (run, undisturbed):
        shutil.rmtree(old, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)

    train("prepare", "--sample", "--tokenizer", "char", "--output-dir", str(out / "data"))
    arguments = [
        *("debug_cpu", "--data.dir", str(out / "data"), "--optimizer.decay-steps=1000"),
        *("--device=cpu", "--model.dropout=0.1", f"--elastic.exact={not args.float}", "--observe.tensorboard=false"),
        *("--evaluate.interval=0", f"--checkpoint.interval={CHECKPOINT_INTERVAL}"),
        f"--elastic.snapshot-interval={SNAPSHOT_INTERVAL}",
    ]
    print(f"{args.events} events on up to {args.nodes} nodes, seed {args.seed}", flush=True)
    started = time.monotonic()
    try:
        happened = disturb(
            arguments,
            run,
            events=args.events,
            nodes=args.nodes,
            seed=args.seed,
            say=lambda line: print(line, flush=True),
        )
        took = time.monotonic() - started
        steps = len(read_metrics(run)) + LAST_STEPS
        print(f"all nodes left; a new job takes the run up and ends it at step {steps}", flush=True)
        finish(arguments, run, nodes=args.nodes - 1, steps=steps)
    except DrillError as error:
        print(f"LAW BROKEN: {error}")
        return 1
    print("the same configuration, undisturbed, in one process", flush=True)
    train("train", *arguments, "--run-dir", str(undisturbed), f"--steps={steps}")

    found, cost = compare(run, undisturbed), account(run)
    laws = {
        "each step once in the kept history": found.same_steps,
        "the same sequences at every step": found.same_sequences,
        "no event cost more than its law allows": all(event.dropped <= event.allowed for event in happened),
        f"losses equal {'up to float sums' if args.float else 'bit for bit'}": found.loss_difference
        <= (FLOAT_TOLERANCE if args.float else 0.0),
    } | ({} if args.float else {"parameters equal bit for bit": found.same_parameters})
    Console(width=None if sys.stdout.isatty() else 140).print(table(happened))
    for law, held in laws.items():
        print(f"{'held  ' if held else 'BROKEN'}  {law}")
    print(
        f"largest loss difference {found.loss_difference:.2g} over {cost.steps} steps; {cost.dropped} steps done again;"
        f" goodput {cost.goodput:.1%} with an event every {took / args.events:.0f} s"
    )
    report = {
        "seed": args.seed,
        "nodes": args.nodes,
        "exact": not args.float,
        "laws": laws,
        "comparison": dataclasses.asdict(found),
        "account": dataclasses.asdict(cost) | {"goodput": cost.goodput},
        "events": [dataclasses.asdict(event) for event in happened],
    }
    (out / "report.json").write_text(json.dumps(report, indent=1))
    draw(run, undisturbed, out / "drill.png")
    print(f"report: {out / 'report.json'}, picture: {out / 'drill.png'}")
    return 0 if all(laws.values()) else 1
