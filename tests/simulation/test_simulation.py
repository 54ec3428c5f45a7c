"""The promises of rendezvous, leases and scaling, on virtual time; and that the simulation sees what once broke them."""

from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from elastic_gpt.nodes import rendezvous
from elastic_gpt.nodes.rendezvous import Leases
from tests.simulation import job as job_room
from tests.simulation.job import Job, Violation, virtual_time
from tests.simulation.schedules import KINDS, MOST_NODES, POLLS, Faults, living, run

SCHEDULES = 300
nodes = st.integers(1, MOST_NODES)


class AnyJob(RuleBasedStateMachine):
    """What hypothesis does to a job: anything, at any time; a failure is shortened to the few events that it takes."""

    @initialize(seed=st.integers(0, 2**32), sizes=st.tuples(nodes, nodes, nodes), poll=st.sampled_from(POLLS))
    def begin(self, seed: int, sizes: tuple[int, int, int], poll: float) -> None:
        least, wanted, most = sorted(sizes)
        self.job = Job(seed, least, most, wanted, poll=poll)
        self.time = virtual_time(self.job.clock)
        self.time.__enter__()
        self.job.begin_all()
        self.faults = Faults(self.job)

    @rule(seconds=st.floats(0.01, 15.0))
    def time_passes(self, seconds: float) -> None:
        self.job.clock.run(self.job.clock.now + seconds)

    @precondition(lambda self: living(self.job))
    @rule(kind=st.sampled_from(KINDS), which=st.integers(0, MOST_NODES), seconds=st.floats(0.0, 30.0))
    def something_happens(self, kind: Any, which: int, seconds: float) -> None:
        there = living(self.job)
        kind(self.faults, there[which % len(there)], seconds)

    def teardown(self) -> None:
        if hasattr(self, "job"):
            try:
                self.job.settle()
            finally:
                self.time.__exit__(None, None, None)


TestAnyJob = AnyJob.TestCase
TestAnyJob.settings = hypothesis.settings(max_examples=60, stateful_step_count=12, deadline=None)


def broken_by(seeds: range, **options: Any) -> dict[int, str]:
    """What is violated under which seed."""
    found = {}
    for seed in seeds:
        try:
            run(seed, **options)
        except Violation as violation:
            found[seed] = str(violation)
    return found


def test_what_is_promised_holds_in_some_hundred_schedules() -> None:
    assert broken_by(range(SCHEDULES)) == {}


def test_a_seed_is_the_same_schedule_each_time() -> None:
    first, second = (run(7, trace=True) for _ in range(2))
    assert first.trace == second.trace
    assert first.commits > 0


# --- old faults, put back: the simulation finds each of them


class NobodyIsLost(Leases):
    """A node that died while it waited stays in the list: the dead node in a new world of dev/LOG.md."""

    def lost(self) -> set[int]:
        return set()


class NobodyAsks(Leases):
    """An agent asks once only, and nobody remembers that it did."""

    def asks(self, rendezvous: str) -> dict[int, Any]:  # noqa: ARG002
        return {}


def test_a_seed_finds_the_two_worlds_that_dlrover_forms_by_itself() -> None:
    found = broken_by(range(40), patch=lambda *_, **__: None)
    assert any("which holds a lease" in why for why in found.values())


@pytest.mark.parametrize(
    ("leases", "seen"), [(NobodyIsLost, "which is known to be lost"), (NobodyAsks, "no world of all")]
)
def test_a_seed_finds_an_old_fault(monkeypatch: pytest.MonkeyPatch, leases: type[Leases], seen: str) -> None:
    monkeypatch.setattr(job_room, "Leases", leases)
    assert any(seen in why for why in broken_by(range(SCHEDULES)).values())


def test_a_seed_finds_a_lease_that_is_given_up_in_a_world(monkeypatch: pytest.MonkeyPatch) -> None:
    start = job_room.Node.start_worker
    monkeypatch.setattr(job_room.Node, "start_worker", lambda node, in_world=False: start(node))  # noqa: ARG005
    assert broken_by(range(1471, 1472)) != {}


def trains(job: Job, nodes: int) -> list[Any]:
    """Let time pass until so many nodes train together."""
    job.clock.run(60.0, stop=lambda: bool(job.lives) and len(job.lives[-1].world) == nodes and job.settled)
    return living(job)


def one_comes_to_a_new_master_first(job: Job, faults: Faults) -> None:
    """A new node asks a master that was just started anew, which the one that trains is slow to find."""
    (old,) = trains(job, 1)
    job.scale(2)
    job.clock.run(60.0, stop=lambda: len(living(job)) == 2)
    job.kill_master(2.0)
    faults.stop(old, 4.0)


def a_world_comes_back_whole(job: Job, faults: Faults) -> None:
    """Two were cut off, so that a third node went on without them; they find the next master before that one does.

    Why it is not enough for a new master that all of the newest world it has heard of are there.
    """
    two = trains(job, 2)
    for node in two:
        faults.cut(node, 14.0)
    job.clock.run(job.clock.now + 6.0)
    job.scale(3)
    job.clock.run(job.clock.now + 8.0)
    job.kill_master(6.0)
    for node in living(job):
        if node not in two:
            faults.stop(node, 8.0)


@pytest.mark.parametrize("what", [one_comes_to_a_new_master_first, a_world_comes_back_whole])
def test_a_new_master_waits_until_all_have_found_it(monkeypatch: pytest.MonkeyPatch, what: Any) -> None:
    def lived(seed: int) -> str:
        job = Job(seed, least=1, most=4, wanted=1 if what is one_comes_to_a_new_master_first else 2)
        with virtual_time(job.clock):
            try:
                job.begin_all()
                what(job, Faults(job))
                job.settle()
            except Violation as violation:
                return str(violation)
        return ""

    seeds = range(20)
    assert [lived(seed) for seed in seeds] == [""] * len(seeds)
    monkeypatch.setattr(rendezvous, "RECONNECT_SECONDS", 0.0)
    found = [lived(seed) for seed in seeds]
    assert any("which holds a lease" in why or "has step" in why for why in found)


def test_a_seed_finds_a_world_that_a_new_master_does_not_know_and_that_waits_for_one_that_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    are_gone = Leases.are_gone
    monkeypatch.setattr(Leases, "are_gone", lambda self, nodes=(): are_gone(self, nodes or ()))
    assert "no world of all 2 nodes" in broken_by(range(68094, 68095))[68094]
