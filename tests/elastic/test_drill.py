"""The drill: it holds the laws against real kills, and sees when one is broken."""

import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_gpt import drill
from elastic_gpt.drill import Drill, DrillError, Event, charge
from elastic_gpt.ledger import PARTS, Ledger
from elastic_gpt.local import LocalJob
from elastic_gpt.processes import of_nodes
from tests.conftest import PATIENCE, TINY, elastic_gpt, events, metrics, until


@pytest.mark.slow
def test_a_short_drill_holds_every_law_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "drill").mkdir()
    done = elastic_gpt("drill", "--events=5", "--nodes=3", "--seed=11", "--output-dir", tmp_path / "drill")
    assert "BROKEN" not in done.stdout
    report = json.loads((tmp_path / "drill/report.json").read_text())
    assert [event["kind"] for event in report["events"]][5:] == [drill.LEAVE]
    assert all(report["laws"].values())
    assert report["comparison"]["loss_difference"] == 0.0
    assert report["account"]["dropped"] == sum(event["dropped"] for event in report["events"])
    assert (tmp_path / "drill/drill.png").stat().st_size > 10_000


def test_a_drill_deletes_nothing_that_is_not_a_drills(tmp_path: Path) -> None:
    kept = tmp_path / "run" / "thesis.txt"
    kept.parent.mkdir()
    kept.touch()
    done = elastic_gpt("drill", "--output-dir", tmp_path, code=2)
    assert "is not a drill's folder: name a new one" in done.stderr
    assert kept.exists()
    assert elastic_gpt("drill", "--output-dir", kept, code=2).stderr.count("\n") == 1


class Job:
    """A job of which nothing is real but its run directory."""

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
    """A drill of such a job that does a step each 50 ms, whatever happens."""

    def __init__(self, run: Path) -> None:
        self.job = Job(run)
        self.drill = Drill(self.job, run, 3, random.Random(1))  # type: ignore[arg-type]
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
    monkeypatch.setattr(drill, "PATIENCE", 3.0)
    pretended.drill.reach(130)  # patience is for each step: this takes longer
    with pytest.raises(DrillError, match="no step of a new world in 3 s"):
        pretended.drill.do("a node joins")


def test_a_hang_is_told(pretended: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drill, "PATIENCE", 1.0)
    pretended.over.set()
    with pytest.raises(DrillError, match="no step in 1 s"):
        pretended.drill.reach(10_000)


def test_an_event_is_over_when_all_nodes_are_in_and_answers_for_each_restart(pretended: Pretended) -> None:
    job = pretended.job
    first = pretended.drill.do("master killed, restarted")
    assert first.dropped == 0  # so far

    one_trains, together = threading.Event(), pretended.drill.together

    def asked() -> bool:
        one_trains.set()
        return together()

    pretended.drill.together = asked  # type: ignore[method-assign]

    def later() -> None:
        time.sleep(0.2)
        job.ledger.begin_life(["a"], 1, 95, "snapshot of node a", 5)
        assert one_trains.wait(PATIENCE)
        time.sleep(0.05)
        job.ledger.begin_life(["a", "b"], 2, 0, "start", 95)
        job.ledger.write("recovered", **dict.fromkeys(PARTS, 0.1))

    job.alive = ["a", "b"]
    threading.Thread(target=later).start()
    second = pretended.drill.do("kill -9 of a worker")
    *_, one, both = (event["time"] - second.time for event in job.ledger.events() if event["event"] == "restored")
    assert one - 0.001 <= second.seconds < both < time.time() - second.time
    charge([first, second], job.ledger.events())
    assert [first.dropped, second.dropped] == [80, 100]
    assert second.parts == dict.fromkeys(PARTS, 0.1)
    assert second.allowed == 10
    job.alive = ["a"]
    assert pretended.drill.kill_worker() == (0, 20)  # with nobody to finish the newest snapshot


def test_a_restart_before_any_event_is_nobodys() -> None:
    happened = [Event("a node joins", 1, 50, time=10.0)]
    charge(
        happened, [{"event": "restored", "time": 9.0, "dropped": 3}, {"event": "restored", "time": 11.0, "dropped": 4}]
    )
    assert happened[0].dropped == 4  # so the sum is not the account's, which breaks the law


def test_a_broken_drill_leaves_no_good_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / drill.MARK).touch()
    report = tmp_path / "report.json"
    report.write_text('{"laws": {"all": true}}')

    def disturb(*_: object, **__: object) -> None:
        assert not report.exists()
        raise DrillError("no step")

    monkeypatch.setattr(drill, "disturb", disturb)
    assert drill.main(["--output-dir", str(tmp_path)]) == 1
    assert json.loads(report.read_text())["broken"] == "no step"


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
        drilled = Drill(job, run, 2, random.Random(1))
        assert drilled.together()
        assert not drilled.orphans()
        job.kill_agent(0)
        until(lambda: not drilled.orphans())
