"""Faults that can be done to a running job on purpose. Each one waits until its effect is over."""

import dataclasses
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from elastic_gpt.contract import CHECKPOINTS, METRICS
from elastic_gpt.ledger import Ledger
from elastic_gpt.nodes.local import LocalJob
from elastic_gpt.processes import of_nodes

SNAPSHOT_INTERVAL = 10  # steps, in the runs that faults happen to
PATIENCE = 120.0  # seconds for a step, or for the effect of a fault; more is a broken law
GONE = 10.0  # seconds in which all processes of a node end after it
JOIN = "a node joins"
LEAVE = "all leave, a new job goes on"  # always the last event
QUIET = ("master killed, restarted", "storage fault")  # these do not stop training


class Stalled(RuntimeError):
    """The run made no progress, or ended before its last step."""


@dataclass
class Event:
    """One fault that was done to the job, and its effect."""

    kind: str
    node: int | None
    step: int
    """Updates done before it."""
    time: float
    """When it happened, seconds since 1970."""
    allowed: int = 0
    """Steps that it may cost according to the laws."""
    dropped: int = 0
    """Steps that had to be done again."""
    orphans: int = 0
    """Processes that were left of nodes that had gone."""
    seconds: float = 0.0
    """Seconds from the event to the first step of the next world."""
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    """Parts of the recovery in seconds, from the ledger."""


class Faults:
    """A job, and the faults that can be done to it.

    Args:
        job: a job whose nodes have been started.
        run: its run directory.
        dice: the source of all random choices.
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
        path = self.run / METRICS
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def possible(self) -> list[str]:
        """Kinds of events that are possible now, since they leave a node alive or start one."""
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
        """Do it, and wait until its effect is over and all nodes train together again."""
        event = Event(kind, None, self.steps(), round(time.time(), 3))  # rounded as in the ledger
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
                raise Stalled(f"no {what} in {PATIENCE:.0f} s at step {self.steps()}: see {self.job.logs}")
            time.sleep(0.02)

    def reach(self, step: int) -> None:
        while (done := self.steps()) < step:
            self.wait(lambda done=done: self.steps() != done, "step")  # type: ignore[misc]

    def trains(self, lives: int) -> bool:
        """Whether a later life than the first `lives` ones has done a step."""
        restored = [event for event in self.ledger.events() if event["event"] == "restored"]
        return bool(restored) and restored[-1]["life"] >= lives and self.steps() > restored[-1]["step"]

    def together(self) -> bool:
        """Whether the newest world has all running nodes, and has done a step."""
        joined = [event for event in self.ledger.events() if event["event"] == "joined"]
        names = {self.job.node_name(node) for node in self.job.running()}
        return bool(joined) and set(joined[-1]["nodes"]) == names and self.trains(joined[-1]["life"])

    def orphans(self) -> list[int]:
        """Processes of nodes that have gone."""
        alive = {self.job.node_name(node) for node in self.job.running()}
        return [process for process, node in of_nodes(self.job.name).items() if node not in alive]

    def any_node(self) -> int:
        return self.dice.choice(self.job.running())

    def cost(self) -> int:
        """Steps that the death of a node's worker may cost.

        None while another node lives; else those since the last snapshot but one, since the last
        may be half written.
        """
        return 0 if len(self.job.running()) > 1 else 2 * SNAPSHOT_INTERVAL

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
        return node, 0

    def kill_node(self) -> tuple[int | None, int]:
        node = self.any_node()
        self.job.kill(node)
        return node, 0

    def kill_first(self) -> tuple[int | None, int]:
        node = min(self.job.running())  # DLRover gives rank 0 to the lowest node
        self.job.kill(node)
        return node, 0

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
        """Wait until these nodes have gone, and start as many new ones."""
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
        """Put a file in place of the folder of checkpoints until a checkpoint has failed."""
        folder, aside = self.run / CHECKPOINTS, self.run / "checkpoints.aside"
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
