"""The ledger: what happened, and what it cost."""

import json
import time
from pathlib import Path

import pytest

from elastic_gpt.ledger import PARTS, Ledger, account, main


def test_lost_nodes_are_told_from_those_that_said_goodbye(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    run_id = ledger.run_id()
    assert ledger.run_id() == run_id
    ledger.begin_life(["a", "b", "c"], 3, 0, "start", 0)
    ledger.write("left", node="c", step=5)
    with ledger.path.open("a") as file:
        file.write("half a li")  # a killed writer's; the next event is not lost to it
    ledger.begin_life(["a", "d"], 2, 5, "snapshot of node a", 2)
    events = ledger.events()
    assert [event["node"] for event in events if event["event"] == "lost"] == ["b"]
    assert [event["life"] for event in events if event["event"] == "joined"] == [0, 1]
    assert events[-1] | {"time": 0} == {
        "event": "restored",
        "time": 0,
        "step": 5,
        "source": "snapshot of node a",
        "dropped": 2,
    }
    assert ledger.branches() == [(0, 0), (1, 5)]
    ledger.write("stopped", step=9)
    ledger.begin_life(["x"], 1, 9, "checkpoint", 0)  # nobody is lost that was asked to stop
    assert [event["node"] for event in ledger.events() if event["event"] == "lost"] == ["b"]


def test_a_recovery_is_split_into_its_parts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    now = time.time()
    ledger.recovered(None, now, now)  # the start of a run is no recovery
    assert ledger.events() == []
    ledger.write("interrupted", node="a", cause="lost a peer")
    noticed = ledger.events()[0]["time"]
    ledger.recovered(noticed - 2, noticed + 0.01, noticed + 0.03)
    recovered = ledger.events()[-1]
    assert [recovered[part] for part in PARTS[:3]] == pytest.approx([2, 0.01, 0.02], abs=0.002)
    assert recovered["first_step"] >= 0


def test_goodput_is_useful_step_time_over_elapsed_time_without_pauses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [
        {"event": "created", "time": 0.0, "run_id": "x"},
        {"event": "joined", "time": 100.0, "life": 0, "nodes": ["a"], "world_size": 1},
        {"event": "restored", "time": 100.0, "step": 0, "source": "start", "dropped": 0},
        {"event": "stopped", "time": 110.0, "step": 4},
        {"event": "joined", "time": 5000.0, "life": 1, "nodes": ["b"], "world_size": 1},
        {"event": "restored", "time": 5000.0, "step": 3, "source": "checkpoint step_00000003", "dropped": 1},
        {"event": "finished", "time": 5010.0, "step": 5},
    ]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    steps = [{"step": step, "tokens": 8 * step, "tokens_per_second": 4.0} for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    total = account(tmp_path)
    assert (total.steps, total.dropped, total.elapsed, total.useful, total.goodput) == (5, 1, 20.0, 10.0, 0.5)
    assert main([str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "goodput 50.0%" in output
    assert "checkpoint step_00000003" in output
    assert main([str(tmp_path / "nowhere")]) == 2
