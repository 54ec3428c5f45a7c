"""The drill: it holds the laws against real kills, and sees when one is broken."""

import json
import shutil
from pathlib import Path

import pytest

from elastic_gpt.compare import compare
from tests.conftest import TINY, elastic_gpt


@pytest.mark.timeout(280)
def test_a_short_drill_holds_every_law_and_says_so(tmp_path: Path) -> None:
    done = elastic_gpt("drill", "--events=5", "--nodes=3", "--seed=11", "--output-dir", tmp_path)
    assert "BROKEN" not in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["events"]) == 5
    assert all(report["laws"].values())
    assert report["comparison"]["loss_difference"] == 0.0
    assert (tmp_path / "drill.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drill") / "run"
    elastic_gpt("train", "debug_cpu", *TINY, "--steps=30", "--data.dir", data, "--run-dir", path)
    return path


def test_a_run_is_the_same_as_itself(run: Path) -> None:
    found = compare(run, run)
    assert (found.same_steps, found.same_sequences, found.loss_difference, found.same_parameters) == (
        True,
        True,
        0.0,
        True,
    )


@pytest.mark.parametrize("broken", ["same_steps", "same_sequences", "loss_difference", "same_parameters"])
def test_each_kind_of_difference_is_seen(run: Path, tmp_path: Path, broken: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    if broken == "same_steps":
        lines.insert(10, lines[10])  # a step that was done twice
    elif broken == "same_sequences":
        lines[10]["sequence_hash"] = lines[11]["sequence_hash"]
    elif broken == "loss_difference":
        lines[10]["loss"] += 1e-6
    else:
        path = other / "checkpoints/step_00000030/model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare(other, run)
    assert found.loss_difference > 0 if broken == "loss_difference" else not getattr(found, broken)
