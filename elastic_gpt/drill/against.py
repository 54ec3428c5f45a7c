"""The same schedule of events for ElasticGPT and for others: what each loses by it, in one table and one picture.

elastic-gpt drill --against torchft torchrun --events 12
"""

import contextlib
import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from elastic_gpt.drill.faults import JOIN
from elastic_gpt.drill.measures import Account, Done, Struck, account, by_event, draw, totals
from elastic_gpt.drill.systems import OTHERS, Other, Ours, undisturbed

WORKER, NODE, FIRST = "kill -9 of a worker", "kill -9 of a node", "kill -9 of rank 0's node"
PREEMPT, ALL, MASTER = "SIGTERM to a node", "kill -9 of all nodes", "master killed, restarted"
CHANGE = {WORKER: 0, NODE: -1, FIRST: -1, PREEMPT: -1, JOIN: 1, MASTER: 0, ALL: 0}  # of the number of nodes
GAP_SECONDS = (3.0, 6.0)  # in which all nodes train between the end of an event and the next
GRACE_SECONDS = 30.0  # from SIGTERM to SIGKILL, as Kubernetes and spot machines have it
MASTER_AWAY = 2.0  # seconds
START_SECONDS = 240.0
LOOK_SECONDS = 0.05

OURS = "elastic-gpt"
BUILT_FOR = {
    OURS: "one run whatever the nodes do: a constant global batch, each sequence once an epoch, survivors that go on",
    "torchrun": "restarts of all workers; the state is what the script saves (here torch.save every 50 steps) and the order of"
    " the data is the script's (here ours); its rendezvous ends with the node that holds it",
    "dlrover": "big jobs on Kubernetes, whose operator replaces nodes, and where a minute is short; Flash Checkpoint saves in"
    " memory every 10 steps and on disk every 50; the order of the data is the script's (here ours)",
    "torchft": "replica groups that go on at the next step without a lost one: by design the batch varies with their number,"
    " a batch in flight is dropped, and nobody takes over the share of the data of a group that is away",
}


class TooLate(OSError):
    """It did not happen in time."""


@dataclass(frozen=True)
class Planned:
    """An event of the schedule."""

    kind: str
    gap: float
    """Seconds of training of all nodes together before it."""


def schedule(events: int, nodes: int, seed: int) -> list[Planned]:
    """The same for all systems: it depends on nothing that happens.

    Every kind strikes a full job, and comes up before one comes up again; after an event that takes a node, one joins.
    """
    dice, alive = random.Random(seed), nodes
    bag: list[str] = []
    found = []
    for _ in range(events):
        bag = bag or [kind for kind in CHANGE if kind != JOIN]
        kind = JOIN if alive < nodes else bag.pop(dice.randrange(len(bag)))
        alive += CHANGE[kind]
        found.append(Planned(kind, round(dice.uniform(*GAP_SECONDS), 1)))
    return found


def disturb(
    job: Ours | Other, plan: Sequence[Planned], *, nodes: int, limit: float, say: Callable[[str], None]
) -> tuple[list[Struck], float, float]:
    """Have the schedule happen to a job that has not begun. Returns the events, when the time that counts began, and ended.

    Args:
        limit: seconds that a job may take to train on with all nodes there are; after that somebody starts it anew.
    """
    struck: list[Struck] = []
    alive = nodes
    _begin(job, nodes)
    began = time.time()
    for number, planned in enumerate(plan):
        time.sleep(planned.gap)
        if planned.kind == MASTER and not job.has_master:
            say(f"{number + 1:>3}/{len(plan)}  {planned.kind}: there is none")
            continue
        event = Struck(planned.kind, time.time())
        struck.append(event)
        alive += CHANGE[planned.kind]
        try:
            _strike(job, planned.kind, limit)
            if planned.kind == MASTER:
                _wait(job, functools.partial(_goes_on, job, alive, job.position()[0] + 10), limit)
            else:
                _wait(job, functools.partial(_all_train, job, alive, event.time), limit)
            event.settled = time.time()
            after = f"all train on after {event.settled - event.time:.1f} s"
        except TooLate as error:
            event.note = str(error)
            after = f"{error}: started anew"
            _begin(job, alive)
        say(f"{number + 1:>3}/{len(plan)}  step {job.position()[0]:>5}  {planned.kind}: {after}")
    time.sleep(GAP_SECONDS[0])
    return struck, began, time.time()


def _begin(job: Ours | Other, nodes: int) -> None:
    """Start all nodes, and wait until they train together. Raises TooLate if they do not."""
    since = time.time()
    job.begin(nodes)
    try:
        _wait(job, lambda: job.together(since), START_SECONDS)
    except TooLate as error:
        raise TooLate(f"{nodes} nodes never trained together ({error}): see their logs") from error


def _goes_on(job: Ours | Other, nodes: int, step: int) -> bool:
    return len(job.running()) == nodes and job.position()[0] >= step


def _all_train(job: Ours | Other, nodes: int, since: float) -> bool:
    return len(job.running()) == nodes and job.together(since)


def _strike(job: Ours | Other, kind: str, limit: float) -> None:
    running = job.running()
    if not running:
        raise TooLate("all nodes had ended")
    first, last = running[0], running[-1]  # whoever there is longest has rank 0, where that means anything
    if kind == WORKER:
        for worker in job.workers_of(last):
            os.kill(worker, signal.SIGKILL)
    elif kind in (NODE, FIRST):
        job.kill(last if kind == NODE else first)
    elif kind == PREEMPT:
        job.terminate(last)
        with contextlib.suppress(TooLate):
            _wait(job, lambda: last not in job.running(), min(GRACE_SECONDS, limit))
        job.kill(last)
    elif kind == ALL:
        for node in running:
            job.kill(node)
        for _ in running:
            job.add_node()
    elif kind == MASTER:
        job.kill_master()
        time.sleep(MASTER_AWAY)
        job.start_master()
    else:
        job.add_node()


def _wait(job: Ours | Other, condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if not job.running():
            raise TooLate("all nodes ended")
        if time.monotonic() > deadline:
            raise TooLate(f"not in {seconds:.0f} s")
        time.sleep(LOOK_SECONDS)


def against(
    names: Sequence[str], data: Path, out: Path, *, events: int, nodes: int, seed: int, exact: bool, limit: float,
    train: Callable[..., None], say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> None:  # fmt: skip
    """Let the same happen to ElasticGPT and to the systems of these names; prints tables, and writes a report and a picture.

    Args:
        data: prepared text.
        out: a folder for all that they leave behind.
        exact: ElasticGPT in exact mode; the others have none.
        limit: as `disturb` has it.
        train: runs a command of ours in one process.
    """
    plan = schedule(events, nodes, seed)
    accounts: dict[str, Account] = {}
    histories: dict[str, tuple[float, list[Done]]] = {}
    sequences = 0
    for name in [OURS, *names]:
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "undisturbed").mkdir(parents=True)
        say(f"{name}: {events} events on up to {nodes} nodes, seed {seed}; logs: {folder}")
        flags = (f"--elastic.exact={exact}",)
        made: Ours | Other = Ours(data, folder, nodes, flags) if name == OURS else OTHERS[name](data, folder, nodes)
        with _ended_by_sigterm(), made as job:
            struck, began, ended = disturb(job, plan, nodes=nodes, limit=limit, say=say)
            done = job.done()
        steps = max(one.step for one in done)
        say(f"{name}: the same {steps} steps, undisturbed")
        if isinstance(made, Ours):
            assert made.order is not None
            sequences = made.order.sequences
            run = folder / "undisturbed" / "run"
            train("train", *Ours.training(data), *flags, "--run-dir", str(run), f"--steps={steps}")
            quiet = made.read(run)
        else:
            quiet = undisturbed(name, data, folder / "undisturbed", nodes, steps)
        accounts[name] = account(done, struck, quiet, sequences=sequences, began=began, ended=ended)
        histories[name] = began, done
        report: dict[str, Any] = {
            "seed": seed, "nodes": nodes, "exact": exact, "limit": limit,
            "schedule": [dataclasses.asdict(one) for one in plan],
            "systems": {one: dataclasses.asdict(found) for one, found in accounts.items()},
        }  # fmt: skip
        (out / "against.json").write_text(json.dumps(report, indent=1))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print("median seconds without a step that was kept, and steps done again")
    console.print(by_event(accounts))
    console.print(totals(accounts))
    for name in accounts:
        say(f"{name} is built for {BUILT_FOR[name]}.")
    draw(accounts, histories, out / "against.png")
    say(f"report: {out / 'against.json'}, picture: {out / 'against.png'}")


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends this process as Ctrl-C does: with all nodes, which are in sessions of their own."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
