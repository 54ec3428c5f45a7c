"""metrics.jsonl has each step of the kept history once; the console speaks now and then."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from elastic_gpt.observers import ConsoleObserver, MetricsObserver
from elastic_gpt.reports import StepReport


def report(step: int, loss: float = 1.0) -> StepReport:
    return StepReport(step, loss, 1e-3, 0.5, step * 8, 100.0, None, 2, "hash")


def steps(path: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in map(json.loads, path.read_text().splitlines())]


def test_steps_that_are_done_again_replace_their_old_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsObserver(path, 0, [])
    for step in range(1, 8):
        first.on_step(report(step))
    first.close()
    second = MetricsObserver(path, 5, [])
    assert second.dropped == 2
    second.on_step(report(6, loss=2.0))
    second.close()
    assert steps(path) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 1.0), (6, 2.0)]


def test_a_line_that_a_killed_writer_left_unfinished_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsObserver(path, 0, []).on_step(report(1))
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    MetricsObserver(path, 2, [asdict(report(2, loss=3.0))]).close()
    assert steps(path) == [(1, 1.0), (2, 3.0)]


def test_what_a_killed_rank_0_did_not_write_comes_from_the_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsObserver(path, 0, []).on_step(report(1))
    MetricsObserver(path, 3, [asdict(report(step, loss=9.0)) for step in (1, 2, 3)]).close()
    assert steps(path) == [(1, 1.0), (2, 9.0), (3, 9.0)]


def test_the_console_says_a_line_every_interval_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    console = ConsoleObserver(steps=25, start=0, interval=10)
    for step in range(1, 26):
        console.on_step(report(step))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[1] for line in lines] == ["10/25", "20/25", "25/25"]
    assert "100 tokens/s" in lines[0]
    assert "2 workers" in lines[0]
