"""under_torchrun.py: the drill's laws hold without DLRover, for the faults that torchrun survives."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from elastic_gpt.drill import drill
from elastic_gpt.drill.faults import SNAPSHOT_INTERVAL
from elastic_gpt.drill.under_torchrun import TorchrunFaults, TorchrunJob
from tests.conftest import elastic_gpt
from tests.drill.test_faults import Job


@pytest.mark.slow
def test_a_short_drill_under_torchrun_holds_every_law(tmp_path: Path) -> None:
    words = ("--under=torchrun", "--events=4", "--nodes=3", "--seed=3", "--output-dir", tmp_path / "drill")
    assert "BROKEN" not in elastic_gpt("drill", *words).stdout
    report = json.loads((tmp_path / "drill/report.json").read_text())
    assert (report["under"], all(report["laws"].values())) == ("torchrun", True)


def test_nothing_of_dlrovers_is_drilled_under_torchrun(tmp_path: Path) -> None:
    with drill.UNDER["torchrun"].job(["train"], least=1, most=2, say=lambda _: None) as job:
        kinds = set(drill.UNDER["torchrun"].faults(job, tmp_path, 2, random.Random(1)).kinds)
    assert not [kind for kind in kinds if "master" in kind or "standby" in kind]
    assert "kill -9 of a node" in kinds


def test_a_killed_worker_may_cost_the_steps_since_a_snapshot_for_all_others_end_with_it(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.alive = ["a", "b"]
    faults = TorchrunFaults(job, tmp_path, 2, random.Random(1))  # type: ignore[arg-type]
    assert faults.kill_worker()[1] == 0  # as DLRover's workers live on
    assert faults.kinds["kill -9 of a worker"]()[1] == 2 * SNAPSHOT_INTERVAL


def test_a_job_has_finished_once_a_node_has_ended_well() -> None:
    job = TorchrunJob.__new__(TorchrunJob)
    for codes, finished in (([None, 1], False), ([None, -9, 0], True)):
        job.nodes = [SimpleNamespace(poll=lambda code=code: code) for code in codes]  # type: ignore[misc]
        assert job.finished() == finished
