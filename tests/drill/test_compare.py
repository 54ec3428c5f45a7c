"""compare.py: equal runs are called equal, and each kind of difference is found."""

import json
import math
import shutil
from pathlib import Path

import pytest

from elastic_gpt.drill.compare import compare
from tests.conftest import TINY, elastic_gpt


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "run"
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


@pytest.mark.parametrize(
    "broken", ["same_steps", "same_sequences", "loss_difference", "not_a_number", "same_parameters"]
)
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
    elif broken == "not_a_number":
        lines[10]["loss"] = math.nan
    else:
        path = other / "checkpoints/step_00000030/model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare(other, run)
    if broken in ("loss_difference", "not_a_number"):
        assert (found.loss_difference > 0, found.loss_difference == math.inf) == (True, broken == "not_a_number")
        assert compare(run, other).loss_difference == found.loss_difference
    else:
        assert not getattr(found, broken)
