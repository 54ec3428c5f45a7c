"""Snapshots: one is whole at any moment, and none of another run or a damaged one is ever taken."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from elastic_gpt.snapshot import SnapshotError, Snapshots


def state(value: float) -> dict[str, torch.Tensor]:
    return {
        "model.w": torch.full((1000, 10), value),
        "optimizer.step": torch.tensor(value),
        "model.h": torch.full((3,), value).half(),
    }


def test_the_newest_is_found_by_the_next_worker_and_loads_what_was_saved(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "node", "run", state(0))
    assert snapshots.newest() is None
    for step in (10, 20, 30):
        snapshots.save(step, state(step), [{"step": step}])
    snapshots.wait()
    again = Snapshots(tmp_path / "node", "run", state(0))
    newest = again.newest()
    assert newest is not None
    assert (newest.step, newest.reports) == (30, [{"step": 30}])
    live = state(0)
    again.load(newest, live)
    assert all(torch.equal(live[name], tensor) for name, tensor in state(30).items())


def test_a_worker_that_comes_back_does_not_overwrite_the_newest_first(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "node", "run", state(0))
    snapshots.save(10, state(10), [])
    snapshots.wait()
    again = Snapshots(tmp_path / "node", "run", state(0))
    newest = again.newest()
    assert newest is not None
    again._header = lambda number: (
        pytest.fail("killed") if number == newest.buffer else tmp_path / "node" / f"{number}.json"
    )  # type: ignore[method-assign]
    again.save(20, state(20), [])  # fails if it touches the buffer of step 10


def test_a_damaged_snapshot_is_not_taken_and_the_one_before_is(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "node", "run", state(0))
    for step in (10, 20):
        snapshots.save(step, state(step), [])
    newest = snapshots.newest() if snapshots.wait() is None else None
    assert newest is not None
    with (tmp_path / "node" / f"{newest.buffer}.tensors").open("r+b") as file:
        file.seek(100)
        file.write(b"?")
    before = snapshots.newest()
    assert before is not None
    assert before.step == 10


def test_snapshots_of_another_run_or_another_model_are_not_seen(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "node", "run", state(0))
    snapshots.save(10, state(10), [])
    snapshots.wait()
    assert Snapshots(tmp_path / "node", "other run", state(0)).newest() is None
    transposed = state(0) | {"model.w": torch.zeros(10, 1000)}
    assert Snapshots(tmp_path / "node", "run", transposed).newest() is None


def test_too_little_shared_memory_is_an_error_that_names_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SnapshotError, match="enlarge /dev/shm"):
        Snapshots(tmp_path / "node", "run", state(0))
    assert not (tmp_path / "node").exists()


SAVER = """
import sys, torch
from pathlib import Path
from elastic_gpt.snapshot import Snapshots
state = {"model.w": torch.zeros(2_000_000)}
snapshots = Snapshots(Path(sys.argv[1]), "run", state)
for step in range(1, 1_000_000):
    snapshots.save(step, {"model.w": torch.full((2_000_000,), float(step))}, [])
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_snapshot(tmp_path: Path) -> None:
    like = {"model.w": torch.zeros(2_000_000)}
    for delay in (0.11, 0.17, 0.23, 0.31):
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path / "node")], stdout=subprocess.PIPE, text=True
        )
        assert saver.stdout
        while int(saver.stdout.readline()) < 3:
            pass
        time.sleep(delay)
        saver.send_signal(signal.SIGKILL)
        done = int(saver.communicate()[0].split()[-1])
        snapshots = Snapshots(tmp_path / "node", "run", like)
        newest = snapshots.newest()
        assert newest is not None
        assert newest.step >= done - 1  # one may still have been without its checksum
        snapshots.load(newest, like)
        assert like["model.w"].unique().tolist() == [float(newest.step)]
        (tmp_path / "node").rename(tmp_path / f"node-{delay}")
