"""The same events for ElasticGPT and for others: the schedule, who is told what, and a small real run of each."""

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from elastic_gpt.drill import against
from elastic_gpt.drill.against import ALL, CHANGE, MASTER, NODE, PREEMPT, WORKER, Planned, disturb, schedule
from elastic_gpt.drill.faults import JOIN
from elastic_gpt.drill.systems import OTHERS, Other, Torchrun
from tests.conftest import elastic_gpt


def test_a_schedule_is_the_same_each_time_and_every_kind_strikes_a_full_job() -> None:
    for seed in range(20):
        plan, alive = schedule(9, 3, seed), 3
        assert plan == schedule(9, 3, seed)
        for one in plan:
            assert alive == (2 if one.kind == JOIN else 3)
            alive += CHANGE[one.kind]
        assert {one.kind for one in plan} == set(CHANGE)  # in nine events each comes up
    assert schedule(20, 3, 1) != schedule(20, 3, 2)


class Pretended(Other):
    """A job of which no process is real: its nodes are numbers, and each step takes 10 ms."""

    way = "file"
    recovers = True

    def __init__(self) -> None:
        self.alive, self.began, self.count, self.said = list[int](), 0.0, 0, list[str]()

    def begin(self, nodes: int) -> None:
        self.said.append(f"begin {nodes}")
        self.alive = []
        for _ in range(nodes):
            self.add_node()
        self.began = self.began or time.time()

    def running(self) -> list[int]:
        return list(self.alive)

    def workers_of(self, _: int) -> list[int]:
        return []

    def add_node(self) -> int:
        self.said.append("add")
        self.alive.append(self.count)
        self.count += 1
        return self.count - 1

    def kill(self, node: int) -> None:
        self.said.append("kill")
        if node in self.alive:
            self.alive.remove(node)

    def terminate(self, _: int) -> None:
        self.said.append("terminate")  # and it does not go

    def kill_master(self) -> None:
        self.said.append("kill master")

    def start_master(self) -> None:
        self.said.append("start master")

    def together(self, _: float) -> bool:
        return self.recovers or self.said[-1].startswith("add")

    def position(self) -> tuple[int, int]:
        return int((time.time() - self.began) * 100), len(self.alive)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "GAP_SECONDS": (0.0, 0.0),
        "GRACE_SECONDS": 0.1,
        "MASTER_AWAY": 0.0,
        "LOOK_SECONDS": 0.01,
    }.items():
        monkeypatch.setattr(against, name, value)


def happens(job: Pretended, *kinds: str, limit: float = 60.0) -> tuple[list[Any], list[str]]:
    told: list[str] = []
    struck, began, ended = disturb(job, [Planned(kind, 0.0) for kind in kinds], nodes=3, limit=limit, say=told.append)
    assert began <= ended
    return struck, told


@pytest.mark.usefixtures("quick")
def test_each_event_is_done_and_waited_for() -> None:
    job = Pretended()
    struck, _ = happens(job, NODE, JOIN, ALL, WORKER, MASTER)
    assert [event.kind for event in struck] == [NODE, JOIN, ALL, WORKER, MASTER]
    assert all(event.settled is not None and event.settled >= event.time for event in struck)
    assert job.said[4:] == ["kill", "add", *["kill"] * 3, *["add"] * 3, "kill master", "start master"]


@pytest.mark.usefixtures("quick")
def test_a_node_that_does_not_go_when_asked_is_killed_as_a_preemption_does() -> None:
    job = Pretended()
    happens(job, PREEMPT)
    assert job.said[4:] == ["terminate", "kill"]


@pytest.mark.usefixtures("quick")
def test_a_job_that_does_not_recover_is_started_anew_and_that_is_told() -> None:
    job = Pretended()
    job.recovers = False
    (event,), told = happens(job, NODE, limit=0.2)
    assert (event.settled, event.note) == (None, "not in 0 s")
    assert "begin 2" in job.said
    assert "started anew" in told[0]


@pytest.mark.usefixtures("quick")
def test_where_there_is_no_master_none_is_killed() -> None:
    job = Pretended()
    job.has_master = False
    struck, told = happens(job, MASTER)
    assert struck == []
    assert "there is none" in told[0]


def test_the_steps_of_a_job_are_what_its_workers_have_told_of_each_world(tmp_path: Path) -> None:
    lines = [
        {"pid": 1, "time": 1.0},
        {"pid": 1, "time": 2.0, "step": 1, "world": 2, "life": 7, "ids": [4, 5], "loss": 1.0},
        {"pid": 2, "time": 2.1, "step": 1, "world": 2, "life": 7, "ids": [6], "loss": 4.0},
        {"pid": 1, "time": 9.0, "step": 1, "world": 1, "life": 8, "ids": [4, 5, 6], "loss": 3.0},
    ]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"pid": 1, "ti')
    job = Torchrun(tmp_path, tmp_path, 2)
    first, again = job.done()
    assert (first.step, first.time, first.world, first.ids, first.loss) == (1, 2.1, 2, (4, 5, 6), 2.0)
    assert (again.time, again.ids, again.loss) == (9.0, (4, 5, 6), 3.0)
    assert job.position() == (1, 1)


def test_flags_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    words = ("drill", "--output-dir", tmp_path / "out")
    assert "leave out --under" in elastic_gpt(*words, "--against", "torchrun", "--under", "dlrover", code=2).stderr
    assert "is for --against" in elastic_gpt(*words, "--limit=9", code=2).stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_small_real_run_of_each_is_reported(tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec(OTHERS[name].needs) is None:
        pytest.skip(f"{OTHERS[name].needs} is not installed")
    words = ("--events=1", "--nodes=2", "--seed=3", "--output-dir", tmp_path / "drill")
    done = elastic_gpt("drill", "--against", name, *words)
    report = json.loads((tmp_path / "drill/against.json").read_text())
    assert list(report["systems"]) == ["elastic-gpt", name]
    for found in report["systems"].values():
        assert found["steps"] > 0
        assert 0 < found["goodput"] <= 1
    ours = report["systems"]["elastic-gpt"]
    assert (ours["skipped"], ours["repeated"], ours["largest_difference"]) == (0, 0, 0.0)
    assert ours["batch"] == [16, 16]
    assert f"{name} is built for " in done.stdout
    assert (tmp_path / "drill/against.png").stat().st_size > 10_000
    assert not [line for line in os.popen("ps -eo args") if str(tmp_path) in line]  # nothing is left
