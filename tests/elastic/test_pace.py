"""A node that is slow for many steps is named once; one that was held up, and one with more to do, is not."""

import os
from pathlib import Path

import pytest

from elastic_gpt import pace
from elastic_gpt.ledger import Ledger
from elastic_gpt.nodes import standby
from elastic_gpt.pace import WINDOW, Pace
from elastic_gpt.testing import _Job
from tests.conftest import elastic_gpt, events

OWN = Path(__file__).parents[2] / "examples/own_model.py"


def found(paces: Pace, seconds: list[float], steps: int = WINDOW) -> list[str]:
    return [slow.node for _ in range(steps) for slow in paces.step(seconds)]


def test_an_even_world_names_nobody_however_uneven_its_shares() -> None:
    paces = Pace(["a", "b", "c"], 4, set())  # shares of one, one and two
    assert found(paces, [1.0] * 4, 10 * WINDOW) == []
    assert found(Pace(["a", "b", "c"], 2, set()), [1.0] * 2, 10 * WINDOW) == []  # one has nothing to do
    assert found(Pace(["a"], 4, set()), [1.0, 9.0, 1.0, 9.0], 10 * WINDOW) == []
    assert found(Pace(["a", "b"], 4, set()), [0.0] * 4, 10 * WINDOW) == []  # nothing is measured on a GPU


def test_a_slow_node_is_named_once_until_it_was_as_fast_as_the_others() -> None:
    named: set[str] = set()
    paces = Pace(["a", "b", "c"], 4, named)
    slow, even, better = [2.0, 1.0, 1.0, 1.0], [1.0] * 4, [1.4, 1.0, 1.0, 1.0]
    assert found(paces, slow) == []  # the first step of a world does not count
    assert found(paces, slow, 1) == ["a"]
    assert found(paces, slow, 3 * WINDOW) == []
    assert found(paces, better, WINDOW) == []
    assert found(paces, slow, WINDOW) == []  # it was never back
    assert found(Pace(["b", "a"], 4, named), [1.0, 1.0, 2.0, 2.0], 2 * WINDOW) == []  # nor does another world forget
    assert found(paces, even, WINDOW) == []
    assert found(paces, slow, WINDOW) == ["a"]


def test_a_node_that_was_held_up_for_less_than_half_the_steps_is_not_slow() -> None:
    paces = Pace(["a", "b"], 2, set())
    assert found(paces, [1.0, 1.0], 1) == []
    for _ in range(5):
        assert found(paces, [100.0, 1.0], WINDOW // 2 - 1) + found(paces, [1.0, 1.0], WINDOW // 2 + 1) == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="workers are forked, which needs Linux")
def test_the_slow_one_of_two_workers_is_named_in_ledger_and_log(tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    slow = "        __import__('time').sleep(0.05 * int(__import__('os').environ['RANK']))\n        step.backward("
    text = OWN.read_text().replace("        step.backward(", slow)
    assert slow in text
    script.write_text("from elastic_gpt import pace\n\npace.WINDOW = 4\n" + text)
    name = f"elastic-gpt-pace-{os.getpid()}"
    standby.keep(name, ["elastic_gpt.script", "torch._dynamo"])
    run = tmp_path / "run"
    _Job(name, script, lambda folder: [folder, "12"], run, workers=2).train()
    told = events(run, "slow")
    nodes = events(run, "joined")[0]["nodes"]
    assert [(event["node"], event["step"]) for event in told] == [(nodes[1], 5)]
    assert told[0]["seconds"] >= 0.05
    assert (tmp_path / "run.log").read_text().count(f"node {nodes[1]} is slow: ") == 1
    assert f"slow from step 5: {nodes[1]}, " in elastic_gpt("ledger", run).stdout
    assert Ledger(run).lives() == 1
    assert pace.WINDOW == WINDOW
