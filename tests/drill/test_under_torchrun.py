"""under_torchrun.py: the drill's laws hold without DLRover, for the faults that torchrun survives."""

import json
import random
from pathlib import Path

import pytest

from elastic_gpt.drill import drill
from tests.conftest import elastic_gpt


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
