"""ledger.py: what happened to a run, and what it cost."""

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from elastic_gpt.identity import Run
from elastic_gpt.ledger import PARTS, Ledger, account, main, read_metrics, strict_json


def test_lost_nodes_are_told_from_those_that_said_goodbye(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    run_id = ledger.run_id()
    assert ledger.run_id() == run_id
    ledger.begin_life(["a", "b", "c"], 3, 0, "start", 0)
    ledger.write("left", node="c", step=5)
    with ledger.path.open("a") as file:
        file.write("half a li")  # left by a killed writer; the next event must not be lost
    ledger.begin_life(["a", "d"], 2, 5, "snapshot of node a", 2)
    events = ledger.events()
    assert [event["node"] for event in events if event["event"] == "lost"] == ["b"]
    assert [event["life"] for event in events if event["event"] == "joined"] == [0, 1]
    assert events[-1] | {"time": 0} == {
        "event": "restored",
        "time": 0,
        "life": 1,
        "step": 5,
        "source": "snapshot of node a",
        "dropped": 2,
    }
    assert ledger.branches() == [(0, 0), (1, 5)]
    ledger.write("stopped", step=9)
    ledger.begin_life(["x"], 1, 9, "checkpoint", 0)  # a node that was asked to stop is not lost
    assert [event["node"] for event in ledger.events() if event["event"] == "lost"] == ["b"]


def test_the_beginning_of_a_life_that_a_full_disk_cuts_is_an_error_and_no_half_of_it_counts(tmp_path: Path) -> None:
    """The system writes as much as there is room for, and says only that it was less."""
    ledger = Ledger(tmp_path)
    ledger.begin_life(["a"], 1, 0, "start", 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ledger.path.stat().st_size + 100, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            ledger.begin_life(["a", "b"], 2, 5, "worker of node a", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ledger.lives() == 1
    ledger.begin_life(["a", "b"], 2, 5, "worker of node a", 0)
    assert ledger.branches() == [(0, 0), (1, 5)]


def test_a_world_that_was_left_out_is_told_once(tmp_path: Path) -> None:
    old, new = Ledger(tmp_path), Ledger(tmp_path)
    old.begin_life(["a", "b"], 2, 0, "start", 0)
    assert not old.superseded()
    old.write("saved", step=10, checkpoint="step_00000010")
    assert not old.superseded()
    new.begin_life(["b"], 1, 5, "snapshot of node b", 0)
    assert old.superseded()
    assert not new.superseded()
    with new.path.open("a", buffering=1) as file:
        file.write('{"event": "joi')  # a line that is being written does not count yet
        file.flush()
        assert not new.superseded()
        file.write('ned", "life": 2}\n')
    assert new.superseded()
    old.path.unlink()
    assert not new.superseded()


def test_a_recovery_is_split_into_its_parts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    now = time.time()
    ledger.recovered(None, now, now)  # the start of a run is not a recovery
    assert ledger.events() == []
    ledger.write("interrupted", node="a", cause="lost a peer")
    noticed = ledger.events()[0]["time"]
    ledger.recovered(noticed - 2, noticed + 0.01, noticed + 0.03)
    recovered = ledger.events()[-1]
    assert [recovered[part] for part in PARTS[:3]] == pytest.approx([2, 0.01, 0.02], abs=0.002)
    assert recovered["first_step"] >= 0


@pytest.mark.parametrize("end", ["stopped", "finished", None])
def test_a_pause_that_was_asked_for_is_not_a_recovery(tmp_path: Path, end: str | None) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin_life(["a"], 1, 0, "start", 0)
    if end:
        ledger.write(end, step=4)
    ledger.write("left", node="a", step=4)  # another node's goodbye may come after
    ledger.begin_life(["a"], 1, 4, "checkpoint", 0)
    now = time.time()
    ledger.recovered(now - 3600, now, now)
    assert ("recovered" in [event["event"] for event in ledger.events()]) == (end is None)
    ledger.begin_life(["a"], 1, 4, "snapshot", 0)  # and the next change is one again
    ledger.recovered(now, now, now)
    assert ledger.events()[-1]["event"] == "recovered"


@pytest.mark.parametrize("back", [False, True])
def test_nodes_that_left_for_good_without_a_word_of_the_last_one_are_a_pause(tmp_path: Path, back: bool) -> None:
    """As when a job is suspended while its second node is between two worlds."""
    ledger = Ledger(tmp_path)
    ledger.begin_life(["a", "b"], 2, 0, "start", 0)
    ledger.write("left", node="a", step=4)
    ledger.begin_life(["b", "c"] if back else ["c", "d"], 2, 4, "checkpoint", 0)
    now = time.time()
    ledger.recovered(now - 3600, now, now)
    written = [event["event"] for event in ledger.events()]
    assert ("recovered" in written) == back
    assert "lost" not in written
    (tmp_path / "metrics.jsonl").write_text("")
    events = ledger.events()
    for event in events[3:]:
        event["time"] += 3600
    ledger.path.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert (account(tmp_path).elapsed > 3000) == back


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


def test_the_first_step_of_a_life_counts_as_a_usual_one_of_it(tmp_path: Path) -> None:
    events = [{"event": "joined", "time": 0.0, "life": 0, "nodes": ["a"], "world_size": 1}]
    # The second life was abandoned: the third began before it, and step 7 is not its first.
    events += [{"event": "restored", "time": 0.0, "step": step, "dropped": 0} for step in (0, 6, 4)]
    events += [{"event": "finished", "time": 100.0, "step": 8}]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    took = [30.0, 1.0, 1.0, 2.0, 40.0, 3.0, 3.0, 3.0]  # seconds
    lines = [{"step": step, "tokens": step, "tokens_per_second": 1 / time} for step, time in enumerate(took, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert account(tmp_path).useful == pytest.approx((1 + 1 + 1 + 2) + 4 * 3)


def test_a_run_whose_writer_was_killed_in_the_middle_of_a_line_is_told_like_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Ledger(tmp_path).begin_life(["a"], 1, 0, "start", 0)
    whole = json.dumps({"step": 1, "tokens": 8, "tokens_per_second": 4.0}).encode() + b"\n"
    for torn in (b'{"step": 2, "tok', b"\xff\xfe\n"):
        (tmp_path / "metrics.jsonl").write_bytes(whole + torn)
        assert main([str(tmp_path)]) == 0
        assert "1 steps kept" in capsys.readouterr().out
        assert read_metrics(tmp_path) == [json.loads(whole)]


def test_what_came_after_the_last_good_step_of_a_life_that_diverged_is_abandoned(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin_life(["a"], 1, 0, "start", 0)
    ledger.write("diverged", step=16, good=12)
    run = Run("run", 1, ledger.branches())
    assert run.valid(0, 12)
    assert not run.valid(0, 13)
    assert run.valid(1, 13)


def test_a_late_goodbye_of_a_node_of_the_life_before_hides_no_outage(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin_life(["a", "b"], 2, 0, "start", 0)
    ledger.begin_life(["b"], 1, 4, "worker of node b", 0)
    ledger.write("left", node="a", step=4)  # it has saved alone, and the others went on meanwhile
    ledger.begin_life(["c"], 1, 4, "checkpoint", 0)  # b was killed
    now = time.time()
    ledger.recovered(now - 60, now, now)
    assert [event["node"] for event in ledger.events() if event["event"] == "lost"] == ["a", "b"]
    assert ledger.events()[-1]["event"] == "recovered"


def test_what_is_not_finite_is_null_in_json() -> None:
    assert strict_json({"a": [float("nan"), 1.5], "b": float("-inf")}) == '{"a": [null, 1.5], "b": null}'


def test_who_listens_hears_who_joined_left_and_was_lost(tmp_path: Path) -> None:
    heard: list[Any] = []
    ledger = Ledger(tmp_path)
    ledger.begin_life(["a", "b", "c"], 3, 0, "start", 0)
    Ledger(tmp_path).write("left", node="b", step=4)  # by that node itself
    ledger.listeners = [heard.append]
    ledger.begin_life(["a", "d"], 2, 4, "worker of node a", 0, stayed=["a"])
    assert [(event["event"], event.get("node") or event.get("nodes")) for event in heard] == [
        ("left", "b"), ("lost", "c"), ("joined", ["a", "d"]), ("restored", None)
    ]  # fmt: skip
    assert heard == ledger.events()[2:]


def test_a_world_that_begins_while_another_writes_its_own_beginning_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = Ledger(tmp_path), Ledger(tmp_path)
    flush, began = os.fsync, []

    def meanwhile(descriptor: int) -> None:
        flush(descriptor)
        if not began:
            began.append(True)
            other.begin_life(["b"], 1, 0, "start", 0, "second")

    monkeypatch.setattr(os, "fsync", meanwhile)
    one.begin_life(["a"], 1, 0, "start", 0, "first")
    assert (one.superseded(), other.superseded()) == (True, False)
