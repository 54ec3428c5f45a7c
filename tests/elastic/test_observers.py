"""observers.py: metrics.jsonl has each step of the kept history once, and the console a line every interval."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_gpt import observers
from elastic_gpt.contract import Progress
from elastic_gpt.observers import ConsoleObserver, MetricsObserver, ProgressObserver
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


@given(st.lists(st.integers(0, 40)), st.integers(0, 30), st.integers(0, 30), st.integers(1, 60))
def test_what_is_kept_does_not_depend_on_how_much_is_read_at_once(
    paddings: list[int], step: int, torn: int, block: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(observers, "BLOCK", block)
        path = Path(folder) / "metrics.jsonl"
        lines = [json.dumps({"step": i + 1, "loss": "x" * padding}) + "\n" for i, padding in enumerate(paddings)]
        unfinished = json.dumps({"step": len(lines) + 1})[: min(torn, 10)]
        path.write_text("".join(lines) + unfinished)
        metrics = MetricsObserver(path, step, [])
        metrics.close()
        assert path.read_text() == "".join(lines[:step])
        assert metrics.dropped == max(0, len(lines) - step) + bool(unfinished)


def test_the_beginning_of_a_long_run_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    long_ago = b"not even JSON\n" * observers.BLOCK
    path.write_bytes(long_ago + b'{"step": 7}\n{"step": 8}\n')
    MetricsObserver(path, 7, []).close()
    assert path.read_bytes() == long_ago + b'{"step": 7}\n'


def test_a_hole_in_the_history_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MetricsObserver(tmp_path / "metrics.jsonl", 5, [asdict(report(5))]).close()
    assert "lacks the steps 1 to 4" in capsys.readouterr().err


def test_a_full_disk_keeps_lines_waiting_and_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsObserver(path, 0, [])
    metrics.on_step(report(1))

    class Full:
        """A file on a full disk: it takes half a line."""

        name = str(path)

        def __init__(self, file: Any) -> None:
            self.file, self.truncate = file, file.truncate

        def write(self, content: bytes) -> int:
            self.file.write(content[:20])
            return 20

    real = metrics.file
    monkeypatch.setattr(metrics, "file", Full(real))
    metrics.on_step(report(2))
    metrics.on_step(report(3))
    assert steps(path) == [(1, 1.0)]  # and no half line
    monkeypatch.setattr(metrics, "file", real)
    metrics.on_step(report(4))
    assert steps(path) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0)]
    assert capsys.readouterr().err.count("make room") == 1


def test_the_console_says_a_line_every_interval_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    console = ConsoleObserver(steps=25, start=0, interval=10)
    for step in range(1, 26):
        console.on_step(report(step))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[1] for line in lines] == ["10/25", "20/25", "25/25"]
    assert "100 tokens/s" in lines[0]
    assert "2 workers" in lines[0]


def test_machines_are_told_of_a_world_at_once_and_then_now_and_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "progress"
    observer = ProgressObserver(steps=25, start=0, interval=10, workers=2, file=file)
    assert Progress.from_line(file.read_text()) == Progress.from_line(capsys.readouterr().out)
    for step in range(1, 26):
        observer.on_step(report(step, loss=1 / step))
    told = [Progress.from_line(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one.step, one.steps, one.loss, one.workers) for one in told if one] == [
        (10, 25, 1 / 10, 2), (20, 25, 1 / 20, 2), (25, 25, 1 / 25, 2)
    ]  # fmt: skip
    assert told[-1]
    assert told[-1].seconds_left == 0
    assert Progress.from_line(file.read_text()) == told[-1]


def test_a_world_that_ends_between_two_lines_tells_its_last_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "progress"
    observer = ProgressObserver(steps=25, start=0, interval=10, workers=2, file=file)
    for step in range(1, 14):
        observer.on_step(report(step))
    observer.close()
    told = [Progress.from_line(line) for line in capsys.readouterr().out.splitlines()]
    assert [one.step for one in told if one] == [0, 10, 13]
    assert Progress.from_line(file.read_text()) == told[-1]


def test_a_full_disk_keeps_no_line_of_progress_from_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ProgressObserver(steps=25, start=3, interval=10, workers=2, file=tmp_path / "absent" / "progress")
    told = Progress.from_line(capsys.readouterr().out)
    assert told
    assert (told.step, told.workers, told.loss) == (3, 2, None)
