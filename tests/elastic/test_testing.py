"""testing.py: a script that is not elastic is told from one that is."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from elastic_gpt.testing import _compare, assert_elastic
from tests.elastic.test_run import OWN, linux


@linux
@pytest.mark.slow
def test_a_script_that_counts_its_own_steps_is_not_elastic(tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    counts = "    run.mine = getattr(run, 'mine', 0) + 1\n    step.update(1e-2 / run.mine)"  # which a restart sets back
    script.write_text(OWN.read_text().replace("    step.update()", counts))
    with pytest.raises(AssertionError, match="one killed after each step: step"):
        assert_elastic(script, lambda run: [run, "60"], tmp_path, sizes=(1,))


def run(folder: Path, weights: bytes = b"w", **second: Any) -> Path:
    """A run of two steps; `second`: what is different about the second one."""
    checkpoint = folder / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(weights)
    lines = [{"step": step, "loss": 2.0, "sequence_hash": f"of {step}"} for step in (1, 2)]
    lines[1] |= second
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("different", "exact", "message"),
    [
        ({"step": 3}, True, "here: not each step once: [1, 3]"),
        ({"sequence_hash": "of 1"}, True, "here: step 2 was not of the same data"),
        ({"sequence_hash": "of 1"}, False, "here: step 2 was not of the same data"),
        ({"loss": 2.0000001}, True, "here: step 2: loss 2.0000001, undisturbed 2.0"),
        ({"loss": 1.85}, False, "here: step 2: loss 1.85, undisturbed 2.0"),
        ({"weights": b"v"}, True, "here: the parameters are not the same bit for bit"),
        ({"loss": 1.95, "weights": b"v"}, False, ""),  # another order of sums
        ({}, True, ""),
    ],
)
def test_what_differs_from_the_undisturbed_run_is_named_with_its_step(
    tmp_path: Path, different: dict[str, Any], exact: bool, message: str
) -> None:
    mine, undisturbed = run(tmp_path / "mine", **different), run(tmp_path / "undisturbed")
    if message:
        with pytest.raises(AssertionError, match=re.escape(message)):
            _compare(mine, undisturbed, "here", exact)
    else:
        _compare(mine, undisturbed, "here", exact)
