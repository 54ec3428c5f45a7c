"""faults.py: each fault waits for its effect, and a job that makes no progress is reported."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_gpt.drill import faults
from elastic_gpt.drill.drill import charge
from elastic_gpt.drill.faults import Faults, Stalled
from elastic_gpt.ledger import PARTS, Ledger
from elastic_gpt.nodes.local import LocalJob
from elastic_gpt.processes import of_nodes
from tests.conftest import PATIENCE, TINY, events, metrics, until


class Job:
    """A fake job; only its run directory is real."""

    logs, name = Path("logs"), "no-such-job"

    def __init__(self, run: Path) -> None:
        self.ledger, self.alive = Ledger(run), ["a"]
        self.ledger.begin_life(["a"], 1, 0, "start", 0)
        (run / "metrics.jsonl").write_text("{}\n" * 100)

    def running(self) -> list[int]:
        return list(range(len(self.alive)))

    def node_name(self, node: int) -> str:
        return self.alive[node]

    def workers_of(self, _: int) -> list[int]:
        return []

    def add_node(self) -> int:
        return 1  # which ends at once

    def kill_master(self) -> None: ...

    def start_master(self) -> None:
        self.ledger.begin_life(["a"], 1, 20, "checkpoint", 80)  # the workers were thrown back


class Pretended:
    """Faults of a fake job that does a step every 50 ms, whatever happens."""

    def __init__(self, run: Path) -> None:
        self.job = Job(run)
        self.faults = Faults(self.job, run, 3, random.Random(1))  # type: ignore[arg-type]
        self.file, self.over = run / "metrics.jsonl", threading.Event()
        threading.Thread(target=self.train, daemon=True).start()

    def train(self) -> None:
        while not self.over.wait(0.05):
            with self.file.open("a") as file:
                file.write("{}\n")


@pytest.fixture
def pretended(tmp_path: Path) -> Iterator[Pretended]:
    found = Pretended(tmp_path)
    yield found
    found.over.set()


def test_an_event_without_effect_is_told_though_training_goes_on(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "PATIENCE", 3.0)
    pretended.faults.reach(130)  # patience is for each step: this takes longer
    with pytest.raises(Stalled, match="no step of a new world in 3 s"):
        pretended.faults.do("a node joins")


def test_a_hang_is_told(pretended: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "PATIENCE", 1.0)
    pretended.over.set()
    with pytest.raises(Stalled, match="no step in 1 s"):
        pretended.faults.reach(10_000)


def test_an_event_is_over_when_all_nodes_are_in_and_answers_for_each_restart(pretended: Pretended) -> None:
    job = pretended.job
    first = pretended.faults.do("master killed, restarted")
    assert first.dropped == 0  # so far

    one_trains, together = threading.Event(), pretended.faults.together

    def asked() -> bool:
        one_trains.set()
        return together()

    pretended.faults.together = asked  # type: ignore[method-assign]

    def later() -> None:
        time.sleep(0.2)
        job.ledger.begin_life(["a"], 1, 95, "snapshot of node a", 5)
        assert one_trains.wait(PATIENCE)
        time.sleep(0.05)
        job.ledger.begin_life(["a", "b"], 2, 0, "start", 95)
        job.ledger.write("recovered", **dict.fromkeys(PARTS, 0.1))

    job.alive = ["a", "b"]
    threading.Thread(target=later).start()
    second = pretended.faults.do("kill -9 of a worker")
    *_, one, both = (event["time"] - second.time for event in job.ledger.events() if event["event"] == "restored")
    assert one - 0.001 <= second.seconds < both < time.time() - second.time
    charge([first, second], job.ledger.events())
    assert [first.dropped, second.dropped] == [80, 100]
    assert second.parts == dict.fromkeys(PARTS, 0.1)
    assert second.allowed == 0  # a survivor holds the last step
    job.alive = ["a"]
    assert pretended.faults.kill_worker() == (0, 20)  # with nobody to finish the newest snapshot


def test_who_trains_is_told_from_who_stands_for_it_and_an_agents_end_is_the_end_of_all(
    data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["train", "debug_cpu", *TINY, "--steps=100000", "--data.dir", str(data), "--run-dir", str(run)]
    with LocalJob(arguments, least=1, most=2, threads=1) as job:
        job.add_node()
        until(lambda: len(metrics(run)) > 20)
        (worker,) = job.workers_of(0)
        assert job.standby_of(0) not in (None, worker)
        (found,) = events(run, "joined")
        assert set(of_nodes(job.name).values()) == {job.node_name(0)} == set(found["nodes"])
        assert {worker, job.standby_of(0), job.nodes[0].pid} < set(of_nodes(job.name))
        drilled = Faults(job, run, 2, random.Random(1))
        assert drilled.together()
        assert not drilled.orphans()
        job.kill_agent(0)
        until(lambda: not drilled.orphans())
