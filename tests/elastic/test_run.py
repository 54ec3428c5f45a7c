"""run.py: a user's own model makes the same run whatever happens to its workers, and mistakes are one line."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_gpt import Elastic
from elastic_gpt.contract import FAILED, RESTART_ME, WORLDS
from elastic_gpt.ledger import Ledger, read_metrics
from elastic_gpt.testing import assert_elastic
from tests.conftest import PATIENCE, elastic_gpt, environment

linux = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="workers are forked, which needs Linux")
ROOT = Path(__file__).parents[2]
OWN = ROOT / "examples/own_model.py"


@linux
def test_the_example_is_elastic_and_an_observer_hears_who_joined(tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    told = (ROOT / "docs/LIBRARY.md").read_text().split("```python\n")[2].split("```")[0]  # the page's own observer
    own = OWN.read_text().replace("from elastic_gpt import Elastic", f"from elastic_gpt import Elastic\n{told}")
    script.write_text(own.replace("exact=True)", "exact=True, observers=[Told()])"))
    assert_elastic(script, lambda run: [run, "8"], tmp_path, sizes=(2,))
    heard = [line for line in (tmp_path / "on-2.log").read_text().splitlines() if line.startswith("told after step ")]
    told_events = [ast.literal_eval(line.split(": ", 1)[1]) for line in heard]
    written = Ledger(tmp_path / "on-2").events()
    # Somebody is killed only after a step of a life, which its observers have heard the beginning of.
    assert [event for event in told_events if event["event"] == "joined"] == [
        event for event in written if event["event"] == "joined"
    ]
    events = Ledger(tmp_path / "on-2").events()
    joined = [event for event in events if event["event"] == "joined"]
    assert len(joined) > 3
    assert all(len(event["stayed"]) == 1 for event in joined[1:])  # one was killed, the other lives on


@linux
@pytest.mark.slow
def test_the_example_is_elastic_in_every_world(tmp_path: Path) -> None:
    assert_elastic(OWN, lambda run: [run, "12"], tmp_path)


def model() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    made = torch.nn.Linear(2, 1)
    return made, torch.optim.SGD(made.parameters(), lr=0.1, momentum=0.9)


DATA = torch.utils.data.TensorDataset(torch.randn(64, 2), torch.randn(64, 1))


def train(run: Elastic) -> list[int]:
    done = []
    for step in run:
        for inputs, targets in step:
            step.backward(((run.model(inputs) - targets) ** 2).sum())
        step.update()
        done.append(step.number)
    return done


def test_a_run_goes_on_where_it_was_and_another_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"global_batch": 16, "micro_batch": 4}
    assert train(Elastic(tmp_path, *model(), DATA, steps=5, **sizes)) == [0, 1, 2, 3, 4]
    assert train(Elastic(tmp_path, *model(), DATA, steps=7, **sizes)) == [5, 6]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(SystemExit, match="2"):
        train(Elastic(tmp_path, *model(), DATA, steps=9, seed=1, **sizes))
    assert "has seed 0, not 1: set it back" in capsys.readouterr().err


def test_replay_verifies_the_checkpoints_of_a_run_wherever_they_are(tmp_path: Path) -> None:
    run, sizes = tmp_path / "run", {"global_batch": 16, "micro_batch": 4}
    train(Elastic(run, *model(), DATA, steps=5, **sizes))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run / "checkpoints", elsewhere)
    train(Elastic(run, *model(), DATA, steps=7, checkpoint_dir=str(elsewhere), **sizes))
    assert f"in order: 2 checkpoints in {elsewhere}," in elastic_gpt("replay", run, "--verify").stdout


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"steps": 5, "global_batch": 16, "micro_batch": 5}, "micro_batch 5 does not divide global_batch 16"),
        ({"steps": 0, "global_batch": 16, "micro_batch": 4}, "steps is 0: it must be at least 1"),
        (
            {"steps": 5, "global_batch": 16, "micro_batch": 4, "exact": True, "traffic": "bfloat16"},
            "traffic bfloat16 rounds",
        ),
        ({"steps": 5, "global_batch": 128, "micro_batch": 4}, "global_batch 128 is more than the data's 64 examples"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sizes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        Elastic(tmp_path, *model(), DATA, **sizes)
    assert message in capsys.readouterr().err


def test_a_model_whose_numbers_would_be_one_workers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    with pytest.raises(SystemExit, match="2"):
        Elastic(tmp_path, bad, torch.optim.SGD(bad.parameters()), DATA, steps=1, global_batch=4, micro_batch=4)
    assert "the model's 1 is a BatchNorm1d" in capsys.readouterr().err


def test_a_step_that_is_not_ended_is_told(tmp_path: Path) -> None:
    code = """
import sys, torch
from elastic_gpt import Elastic
model = torch.nn.Linear(1, 1)
data = torch.utils.data.TensorDataset(torch.ones(4, 1))
for step in Elastic(sys.argv[1], model, torch.optim.SGD(model.parameters()), data, steps=2, global_batch=4, micro_batch=4):
    pass
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment(),
        check=False,
    )
    assert done.returncode == 1
    assert "step.update() was not called" in done.stderr


@pytest.mark.parametrize(
    ("error", "socket", "expected"),
    [
        ("PeerLost", False, RESTART_ME),
        ("NotJoined", False, FAILED),  # it would be tried a thousand times
        ("NotJoined", True, RESTART_ME),  # `Worlds` has counted
    ],
)
def test_where_each_try_to_form_a_world_ends_a_worker_its_agent_counts_them(
    error: str, socket: bool, expected: int, tmp_path: Path
) -> None:
    code = f"""
from pathlib import Path
from elastic_gpt import run, world
run.NETWORK_SECONDS = 0.0
with run.exits(Path({str(tmp_path)!r})):
    raise world.{error}("lost")
"""
    variables = environment(TORCHELASTIC_RUN_ID="run") | ({WORLDS: "socket"} if socket else {})
    done = subprocess.run([sys.executable, "-c", code], timeout=PATIENCE, env=variables, check=False)
    assert done.returncode == expected
