"""Kill and scale on purpose, then prove that nothing changed.

    elastic-gpt drill --events 20 --seed 7 --nodes 4

A random schedule of kills, preemptions, joins, master restarts and storage faults on local nodes, under the real DLRover
master and agents; the same configuration undisturbed; and a report of whether the laws held, as a table, JSON and a picture.
"""

import argparse
import dataclasses
import json
import math
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
from typing import Any

from rich.console import Console
from rich.table import Table

from elastic_gpt.compare import compare, draw
from elastic_gpt.ledger import PARTS, Ledger, account, read_metrics
from elastic_gpt.local import LocalJob
from elastic_gpt.processes import of_nodes
from elastic_gpt.settings import fail

GAP = (20, 60)  # steps between an event and the end of the one before
LAST_STEPS = 40  # after all events
SNAPSHOT_INTERVAL, CHECKPOINT_INTERVAL = 10, 100
PATIENCE = 120.0  # seconds for a step, or for an event to have its effect: a hang is a broken law
GONE = 10.0  # seconds in which everything that a node started ends after it
JOIN = "a node joins"
LEAVE = "all leave, a new job goes on"  # the last event
QUIET = ("master killed, restarted", "storage fault")  # training goes on
MARK = ".drill"  # in the output folder: what is in it may be deleted
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
    time: float
    """When it was done, seconds since 1970."""
    allowed: int = 0
    """Steps that the laws let it cost."""
    dropped: int = 0
    """Steps that had to be done again."""
    orphans: int = 0
    """Processes of nodes that were gone by then."""
    seconds: float = 0.0
    """From the event to the first step of the world that came of it."""
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
            "kill -9 of a standby": self.kill_standby,
            "kill -9 of an agent": self.kill_agent,
            "kill -9 of a node": self.kill_node,
            "kill -9 of rank 0's node": self.kill_first,
            "SIGTERM to a node": self.preempt,
            "SIGTERM to all nodes": self.preempt_all,
            "kill -9 of all nodes": self.kill_all,
            JOIN: self.join,
            "master killed, restarted": self.restart_master,
            "storage fault": self.storage_fault,
        }

    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def possible(self) -> list[str]:
        """Events that leave a node alive, or start one."""
        alive = len(self.job.running())
        never = set()
        if alive < 2:
            never |= {"kill -9 of an agent", "kill -9 of a node", "kill -9 of rank 0's node", "SIGTERM to a node"}
        if alive >= self.nodes:
            never.add(JOIN)
        if not any(self.job.standby_of(node) for node in self.job.running()):
            never.add("kill -9 of a standby")
        return [kind for kind in self.kinds if kind not in never]

    def do(self, kind: str) -> Event:
        """Do it, and wait until what comes of it is over: all nodes there are train on together."""
        event = Event(kind, None, self.steps(), round(time.time(), 3))  # as the ledger rounds
        lives = self.ledger.lives()
        event.node, event.allowed = (self.kinds | {LEAVE: self.leave})[kind]()
        if kind in QUIET:
            self.wait(lambda: self.steps() > event.step + 5, "step")
        elif kind != LEAVE:
            self.wait(lambda: self.trains(lives), "step of a new world")
            event.seconds = time.time() - event.time
            self.wait(self.together, "step of all nodes together")
        deadline = time.monotonic() + GONE
        while (orphans := self.orphans()) and time.monotonic() < deadline:
            time.sleep(0.1)
        event.orphans = len(orphans)
        return event

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise DrillError(f"no {what} in {PATIENCE:.0f} s at step {self.steps()}: see {self.job.logs}")
            time.sleep(0.02)

    def reach(self, step: int) -> None:
        while (done := self.steps()) < step:
            self.wait(lambda done=done: self.steps() != done, "step")  # type: ignore[misc]

    def trains(self, lives: int) -> bool:
        """Whether a life after the first `lives` has done a step."""
        restored = [event for event in self.ledger.events() if event["event"] == "restored"]
        return bool(restored) and restored[-1]["life"] >= lives and self.steps() > restored[-1]["step"]

    def together(self) -> bool:
        """Whether the nodes there are make up the newest world, and it has done a step."""
        joined = [event for event in self.ledger.events() if event["event"] == "joined"]
        names = {self.job.node_name(node) for node in self.job.running()}
        return bool(joined) and set(joined[-1]["nodes"]) == names and self.trains(joined[-1]["life"])

    def orphans(self) -> list[int]:
        """Processes of nodes that are gone."""
        alive = {self.job.node_name(node) for node in self.job.running()}
        return [process for process, node in of_nodes(self.job.name).items() if node not in alive]

    def any_node(self) -> int:
        return self.dice.choice(self.job.running())

    def cost(self) -> int:
        """Steps that the death of a node's worker may cost. Others finish the snapshot of which it was writing its copy."""
        return SNAPSHOT_INTERVAL * (1 if len(self.job.running()) > 1 else 2)

    def kill_worker(self) -> tuple[int | None, int]:
        node = self.any_node()
        for worker in self.job.workers_of(node):
            os.kill(worker, signal.SIGKILL)
        return node, self.cost()

    def kill_standby(self) -> tuple[int | None, int]:
        standbys = {node: self.job.standby_of(node) for node in self.job.running()}
        node = self.dice.choice([node for node, standby in standbys.items() if standby])
        os.kill(standbys[node] or 0, signal.SIGKILL)
        return node, self.cost()

    def kill_agent(self) -> tuple[int | None, int]:
        node = self.any_node()
        self.job.kill_agent(node)
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
        saved = [event["step"] for event in self.ledger.events() if event["event"] == "saved"]
        allowed = self.steps() - max(saved, default=0)
        self.replace(nodes)
        return None, allowed

    def leave(self) -> tuple[int | None, int]:
        nodes = self.job.running()
        for node in nodes:
            self.job.terminate(node)
        self.gone(nodes)
        return None, 0

    def gone(self, nodes: list[int]) -> None:
        self.wait(lambda: not set(self.job.running()) & set(nodes), "end of the nodes that were asked to leave")

    def replace(self, nodes: list[int]) -> None:
        """Wait until the nodes are gone, and start as many others."""
        self.gone(nodes)
        for _ in nodes:
            self.job.add_node()

    def join(self) -> tuple[int | None, int]:
        return self.job.add_node(), 0

    def restart_master(self) -> tuple[int | None, int]:
        self.job.kill_master()
        time.sleep(self.dice.random() * 2)
        self.job.start_master()
        return None, 0

    def storage_fault(self) -> tuple[int | None, int]:
        """There is a file where the folder of checkpoints was, until a checkpoint has failed for it."""
        folder, aside = self.run / "checkpoints", self.run / "checkpoints.aside"
        folder.mkdir(exist_ok=True)
        folder.rename(aside)
        folder.touch()
        try:
            failed = self.count("save_failed")
            self.wait(lambda: self.count("save_failed") > failed, "failed checkpoint")
        finally:
            folder.unlink()
            aside.rename(folder)
        saved = self.count("saved")
        self.wait(lambda: self.count("saved") > saved, "checkpoint after a failed one")
        return None, 0

    def count(self, kind: str) -> int:
        return sum(event["event"] == kind for event in self.ledger.events())


def train(*words: str) -> None:
    """A training in one process with one CPU thread, as each local node has."""
    subprocess.run(
        [sys.executable, "-m", "elastic_gpt.cli", *words],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def disturb(
    arguments: list[str], run: Path, happened: list[Event], *, events: int, nodes: int, seed: int,
    say: Callable[[str], None]
) -> None:  # fmt: skip
    """Train on local nodes while a random schedule of events happens to them, which `happened` gets; in the end all leave."""
    dice = random.Random(seed)
    endless = ["train", *arguments, "--run-dir", str(run), "--steps=1000000"]
    with LocalJob(endless, least=1, most=nodes, threads=1, say=lambda _: None) as job:
        say(f"logs: {job.logs}")
        drill = Drill(job, run, nodes, dice)
        for _ in range(nodes - 1):
            job.add_node()
        drill.wait(drill.together, "step of all nodes together")
        bag: list[str] = []
        for number in range(events):
            drill.reach(drill.steps() + dice.randint(*GAP))
            # Every kind comes up before one comes up again; for those that need more nodes than there are, one joins.
            bag, possible = bag or list(drill.kinds), drill.possible()
            kind = dice.choice(
                [kind for kind in bag if kind in possible] or [kind for kind in possible if kind == JOIN] or possible
            )
            bag = [other for other in bag if other != kind]
            event = drill.do(kind)
            happened.append(event)
            charge(happened, drill.ledger.events())
            where = "" if event.node is None else f" (node {event.node})"
            say(
                f"{number + 1:>3}/{events}  step {event.step:>5}  {kind}{where}: {event.dropped} again, {event.seconds:.1f} s"
            )
        drill.reach(drill.steps() + GAP[0])
        happened.append(drill.do(LEAVE))


def charge(happened: list[Event], ledger: list[dict[str, Any]]) -> None:
    """Give what the ledger knows of restarts to the last event before each."""
    for event, end in zip(happened, [*(event.time for event in happened[1:]), math.inf], strict=True):
        after = [entry for entry in ledger if event.time <= entry["time"] < end]
        event.dropped = sum(entry["dropped"] for entry in after if entry["event"] == "restored")
        recovered = [entry for entry in after if entry["event"] == "recovered"]
        event.parts = {part: recovered[0][part] for part in PARTS} if recovered else {}


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
        row = [kind, str(len(these)), str(most), str(max(event.allowed for event in these))]
        if kind in QUIET:
            row.append("not interrupted")
        elif kind != LEAVE:
            seconds = [event.seconds for event in these]
            row += [f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"]
            if still := [sum(event.parts.values()) for event in these if event.parts]:  # an asked stop has none
                row.append(f"{statistics.median(still):.1f}")
        drawn.add_row(*row)
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
    run, undisturbed, report = out / "run", out / "undisturbed", out / "report.json"
    if out.exists() and not (out / MARK).exists() and (out.is_file() or any(out.iterdir())):
        return fail(ValueError(f"{out} is not a drill's folder: name a new one with --output-dir"))
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()
    for old in (run, undisturbed):
        shutil.rmtree(old, ignore_errors=True)
    report.unlink(missing_ok=True)

    train("prepare", "--sample", "--tokenizer", "char", "--output-dir", str(out / "data"))
    arguments = [
        *("debug_cpu", "--data.dir", str(out / "data"), "--optimizer.decay-steps=1000"),
        *("--device=cpu", "--model.dropout=0.1", f"--elastic.exact={not args.float}", "--observe.tensorboard=false"),
        *("--evaluate.interval=0", f"--checkpoint.interval={CHECKPOINT_INTERVAL}"),
        f"--elastic.snapshot-interval={SNAPSHOT_INTERVAL}",
    ]
    print(f"{args.events} events on up to {args.nodes} nodes, seed {args.seed}", flush=True)
    happened: list[Event] = []
    found: dict[str, Any] = {"seed": args.seed, "nodes": args.nodes, "exact": not args.float}
    started = time.monotonic()
    try:
        disturb(
            arguments,
            run,
            happened,
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
        found |= {"broken": str(error), "events": [dataclasses.asdict(event) for event in happened]}
        report.write_text(json.dumps(found, indent=1))
        return 1
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
    return 0 if all(laws.values()) else 1
