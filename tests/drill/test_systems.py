"""What the jobs of a comparison tell of themselves, and how their nodes are started."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from elastic_gpt.drill import systems
from elastic_gpt.drill.measures import kept
from elastic_gpt.drill.systems import Ours, TorchFT
from elastic_gpt.order import Order, sequence_count, sequence_hash
from prepare.data import open_split
from tests.conftest import until


@pytest.fixture
def ours(data: Path, tmp_path: Path) -> Iterator[Ours]:
    job = Ours(data, tmp_path, 2)
    job.run.mkdir()
    settings = {"global_batch": 16, "seed": 5, "model": {"block_size": 64}}
    (job.run / "config.yaml").write_text(yaml.safe_dump(settings))
    threading.Thread(target=job._watch, daemon=True).start()
    yield job
    job._over.set()


def test_our_steps_are_taken_as_they_come_those_that_are_lost_too(ours: Ours) -> None:
    order = Order(sequence_count(len(open_split(ours.data, "train")), 64), 16, 5)

    def line(step: int, loss: float) -> str:
        used = {"step": step, "loss": loss, "world_size": 2, "sequence_hash": sequence_hash(order.ids(step - 1))}
        return json.dumps(used) + "\n"

    metrics = ours.run / "metrics.jsonl"
    metrics.write_text(line(1, 9.0) + line(2, 8.0) + line(3, 7.0) + '{"step": 4, "lo')
    until(lambda: len(ours.history) == 3)
    # Cut at step 1 and grown past where it was, before anybody looked again; one line is of other sequences.
    metrics.write_text(
        line(1, 9.0) + line(2, 0.8125) + line(3, 0.703125) + line(4, 0.6).replace('hash": "', 'hash": "x')
    )
    until(lambda: len(ours.history) == 6)
    assert [(one.step, one.loss) for one in ours.done()] == [
        (1, 9.0),
        (2, 8.0),
        (3, 7.0),
        (2, 0.8125),
        (3, 0.703125),
        (4, 0.6),
    ]
    assert [len(one.ids) for one in kept(ours.done())] == [16, 16, 16, 0]  # nobody knows what the last one used
    assert ours.history[0].ids == tuple(order.ids(0).tolist())
    assert ours.position() == (4, 2)


def test_a_new_replica_group_has_the_number_of_one_that_is_away_and_finds_the_same_lighthouse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, str]] = []

    def start(_job: Any, _command: list[str], _log: str, **environment: str) -> Any:
        started.append((environment.get("REPLICA_GROUP_ID", ""), environment.get("TORCHFT_LIGHTHOUSE", "")))
        return SimpleNamespace(code=None, poll=lambda: None)

    monkeypatch.setattr(systems.Other, "start", start)
    monkeypatch.setattr(TorchFT, "start_master", lambda job: setattr(job, "master", job.port))
    monkeypatch.setattr(TorchFT, "kill", lambda job, node: setattr(job.nodes[node], "poll", lambda: -9))
    job = TorchFT(tmp_path, tmp_path, 3).__enter__()
    job.begin(3)
    job.kill(1)
    job.add_node()
    job.begin(2)
    assert [group for group, _ in started] == ["0", "1", "2", "1", "0", "1"]
    assert {lighthouse for _, lighthouse in started} == {f"http://127.0.0.1:{job.master}"}


def test_what_a_comparison_starts_ends_with_it_even_when_it_is_killed(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from elastic_gpt.drill.systems import Torchrun
job = Torchrun(Path(), Path({str(tmp_path)!r}), 2)
print(job.start(["-c", "import time; time.sleep(600)"], "log").pid, flush=True)
input()
"""
    drill = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert drill.stdout
    started = int(drill.stdout.readline())
    assert psutil.pid_exists(started)
    drill.kill()
    drill.wait()
    until(lambda: not psutil.pid_exists(started) or psutil.Process(started).status() == psutil.STATUS_ZOMBIE)
