"""What a seed does to a job: its size, its network, and what happens to it when."""

import random
from collections.abc import Callable
from typing import Any

from elastic_gpt.nodes.mend import STEP_SECONDS
from elastic_gpt.nodes.rendezvous import PATIENCE_SECONDS
from tests.simulation.job import COLLECTIVE_SECONDS, Job, Node, Violation, virtual_time

POLLS = (0.05, 0.2, 0.5)
MOST_NODES = 5


def living(job: Job) -> list[Node]:
    return [node for node in job.nodes.values() if node.alive and not node.leaves]


class Faults:
    """What can be done to a job; each takes the job's node, if it needs one, and seconds."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def kill_node(self, node: Node, seconds: float) -> None:
        """kill -9 of all of it; the master learns of it in up to so many seconds."""
        self.job.say(f"{node} is killed")
        node.kill()
        self.job.ended(node, seconds)

    def vanish(self, node: Node, seconds: float) -> None:
        """Its machine is off: no connection is closed, and no word comes."""
        self.job.say(f"{node} vanishes")
        node.kill(silently=True)
        self.job.ended(node, seconds)
        self.job.disturb(seconds, COLLECTIVE_SECONDS)

    def kill_worker(self, node: Node, seconds: float) -> None:  # noqa: ARG002 - all have it
        self.job.say(f"{node} loses its worker")
        node.kill_worker()
        self.job.disturb(0.0)

    def ask_to_leave(self, node: Node, seconds: float) -> None:  # noqa: ARG002
        self.job.say(f"{node} is preempted")
        node.ask_to_leave()
        self.job.disturb(0.0)

    def stop(self, node: Node, seconds: float) -> None:
        """The machine stands still."""
        self.job.say(f"{node} stands still for {seconds:.1f} s")
        node.still_until = self.job.clock.now + seconds
        self.job.disturb(seconds, COLLECTIVE_SECONDS)

    def stick(self, node: Node, seconds: float) -> None:
        """The agent does nothing, and its lease is renewed all the same."""
        self.job.say(f"the agent of {node} is stuck for {seconds:.1f} s")
        node.stuck_until = self.job.clock.now + seconds
        self.job.disturb(seconds, PATIENCE_SECONDS)

    def cut(self, node: Node, seconds: float) -> None:
        self.job.say(f"{node} is cut off from the master for {seconds:.1f} s")
        node.cut_until = self.job.clock.now + seconds
        self.job.disturb(seconds)

    def slow_step(self, node: Node, seconds: float) -> None:
        seconds = min(seconds, STEP_SECONDS - 2.0)
        self.job.say(f"the next step of {node} takes {seconds:.1f} s more")
        node.slow.append(seconds)
        self.job.disturb(seconds, seconds)

    def kill_master(self, node: Node, seconds: float) -> None:  # noqa: ARG002
        self.job.kill_master(min(seconds, 20.0))

    def scale(self, node: Node, seconds: float) -> None:  # noqa: ARG002
        self.job.scale(self.job.random.randint(self.job.least, self.job.most))

    def lose_messages(self, node: Node, seconds: float) -> None:  # noqa: ARG002
        self.job.say(f"messages are late for {seconds:.1f} s")
        self.job.loss = self.job.random.choice((0.02, 0.1, 0.3))
        self.job.clock.after(seconds, lambda: setattr(self.job, "loss", 0.0))
        self.job.disturb(seconds)

    def jump(self, node: Node, seconds: float) -> None:  # noqa: ARG002
        self.job.jump(self.job.random.choice((-3600.0, -5.0, 5.0, 3600.0)))


KINDS: list[Callable[[Faults, Node, float], None]] = [
    value for name, value in vars(Faults).items() if not name.startswith("_")
]


def new_job(chance: random.Random, seed: int, **options: Any) -> Job:
    most = chance.randint(1, MOST_NODES)
    wanted = chance.randint(1, most)
    least = chance.randint(1, wanted)
    job = Job(seed, least, most, wanted, poll=chance.choice(POLLS), **options)
    job.step = chance.choice((0.1, 0.5, 2.0))
    return job


def run(seed: int, **options: Any) -> Job:
    """Live through one schedule.

    Args:
        options: of Job.

    Raises:
        Violation: with `job` in its attribute of that name.
    """
    chance = random.Random(f"schedule {seed}")
    job = new_job(chance, seed, **options)
    with virtual_time(job.clock):
        try:
            job.begin_all()
            faults = Faults(job)
            # Often right after one another: what goes wrong does so while something else is not over yet.
            for _ in range(chance.randint(1, 8)):
                job.clock.run(job.clock.now + chance.choice((0.05, 0.5, 3.0, 12.0)) * chance.random())
                kind = chance.choice(KINDS)
                there = living(job)
                if there:
                    kind(faults, chance.choice(there), chance.choice((0.5, 4.0, 8.0, 30.0)) * chance.random())
            job.settle()
        except Violation as violation:
            violation.job = job  # type: ignore[attr-defined]
            raise
    return job
