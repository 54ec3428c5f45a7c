"""snapshot.py: one snapshot is whole at any moment, and a damaged one or one of another run is never loaded."""

import builtins
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch

from elastic_gpt import devices, snapshot
from elastic_gpt.identity import Run
from elastic_gpt.snapshot import LEFT_OVER_SECONDS, Snapshot, SnapshotError, Snapshots
from tests.conftest import until
from tests.gpu.late_copies import LateCopy, copy_late


def always(_snapshot: Snapshot) -> bool:
    return True


def state(value: float) -> dict[str, torch.Tensor]:
    return {
        "model.w": torch.full((1000, 10), value),
        "optimizer.step": torch.tensor(value),
        "model.h": torch.full((3,), value).half(),
    }


def test_the_newest_is_found_by_the_next_worker_and_loads_what_was_saved(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "run", "node", "run", state(0))
    assert snapshots.newest(always) is None
    for step in (10, 20, 30):
        snapshots.save(step, 0, state(step), [{"step": step}])
    snapshots.wait()
    again = Snapshots(tmp_path / "run", "node", "run", state(0))
    newest = again.newest(always)
    assert newest is not None
    assert (newest.step, newest.reports) == (30, [{"step": 30}])
    live = state(0)
    again.load(newest, live)
    assert all(torch.equal(live[name], tensor) for name, tensor in state(30).items())


def test_a_worker_that_comes_back_does_not_overwrite_the_newest_first(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        snapshots = Snapshots(tmp_path / "run", "node", "run", state(0))
        snapshots.newest(always)
        snapshots.save(step, 0, state(step), [])
        snapshots.wait()
    steps = [json.loads(header.read_text())["step"] for header in (tmp_path / "run" / "node").glob("*.json")]
    assert sorted(steps) == [20, 30]


def test_what_a_node_that_is_no_more_held_on_this_machine_is_found_and_then_dropped(tmp_path: Path) -> None:
    Snapshots(tmp_path / "run", "old", "run", state(0)).save(10, 0, state(10), [])
    snapshots = Snapshots(tmp_path / "run", "new", "run", state(0))
    newest = wait_for(snapshots)
    live = state(0)
    snapshots.load(newest, live)
    assert torch.equal(live["model.w"], state(10)["model.w"])
    snapshots.drop_others(["new", "other"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["new"]
    snapshots.discard()
    assert not (tmp_path / "run").exists()


def wait_for(snapshots: Snapshots) -> Snapshot:
    until(lambda: snapshots.newest(always))
    newest = snapshots.newest(always)
    assert newest
    return newest


def test_an_abandoned_end_of_the_history_is_not_taken(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "run", "node", "run", state(0))
    for life, step in ((0, 170), (1, 110)):  # life 1 began at 100
        snapshots.save(step, life, state(step), [])
    snapshots.wait()
    run = Run("run", 2, [(0, 0), (1, 100)])
    newest = snapshots.newest(lambda one: run.valid(one.life, one.step))
    assert newest is not None
    assert newest.step == 110
    assert not run.valid(0, 170)
    assert run.valid(0, 100)


def test_the_snapshot_that_was_restored_is_not_the_one_that_is_overwritten_next(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "run", "node", "run", state(0))
    for step in (20, 30):
        snapshots.save(step, 1, state(step), [])
    snapshots.wait()
    again = Snapshots(tmp_path / "run", "node", "run", state(0))
    newest = again.newest(lambda one: one.step <= 20)  # another node's life began there: 30 is abandoned
    assert newest is not None
    assert newest.step == 20
    again.save(21, 2, state(21), [])
    again.wait()
    assert json.loads(newest.header.read_text())["step"] == 20


def test_only_what_is_taken_is_checksummed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for node in ("one", "two"):
        snapshots = Snapshots(tmp_path / "run", node, "run", state(0))
        for step in (10, 20):
            snapshots.save(step, 0, state(step), [])
        snapshots.wait()
    sums, checksum = [], zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda *content: sums.append(content) or checksum(*content))
    assert snapshots.newest(always) is not None
    assert len(sums) == 1


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"identity": 1}'])
def test_a_header_that_says_too_little_does_not_count(tmp_path: Path, text: str) -> None:
    snapshots = Snapshots(tmp_path / "run", "node", "run", state(0))
    for step in (10, 20):
        snapshots.save(step, 0, state(step), [])
    snapshots.wait()
    newest = snapshots.newest(always)
    assert newest is not None
    content = json.loads(newest.header.read_text())
    newest.header.write_text(json.dumps({"identity": content["identity"]}) if "identity" in text else text)
    before = snapshots.newest(always)
    assert before is not None
    assert before.step == 10


def test_a_folder_that_is_not_this_users_alone_is_not_used(tmp_path: Path) -> None:
    for name in ("open", "link"):
        (tmp_path / name).mkdir()
    (tmp_path / "open").chmod(0o755)
    (tmp_path / "link").rmdir()
    (tmp_path / "link").symlink_to(tmp_path)
    folders = ["open", "link"]
    if os.getuid() == 0:
        (tmp_path / "theirs").mkdir(mode=0o700)
        os.chown(tmp_path / "theirs", 65534, 65534)
        folders.append("theirs")
    for name in folders:
        with pytest.raises(SnapshotError, match="not this user's alone"):
            Snapshots(tmp_path / name / "run", "node", "run", state(0))
        assert not (tmp_path / name / "run").exists()


def test_a_full_shared_memory_costs_the_snapshot_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshots = Snapshots(tmp_path / "run", "node", "run", state(0))
    snapshots.save(10, 0, state(10), [])
    snapshots.wait()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    snapshots.save(20, 0, state(20), [])
    snapshots.wait()
    assert "could not be kept" in capsys.readouterr().err
    newest = snapshots.newest(always)
    assert newest is not None
    assert newest.step == 10


def test_a_damaged_snapshot_is_not_taken_and_the_one_before_is(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "run", "node", "run", state(0))
    for step in (10, 20):
        snapshots.save(step, 0, state(step), [])
    newest = snapshots.newest(always) if snapshots.wait() is None else None
    assert newest is not None
    with newest.header.with_suffix(".tensors").open("r+b") as file:
        file.seek(100)
        file.write(b"?")
    before = snapshots.newest(always)
    assert before is not None
    assert before.step == 10


def test_snapshots_of_another_run_or_another_model_are_not_seen(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "run", "node", "run", state(0))
    snapshots.save(10, 0, state(10), [])
    snapshots.wait()
    assert Snapshots(tmp_path / "run", "node", "other run", state(0)).newest(always) is None
    transposed = state(0) | {"model.w": torch.zeros(10, 1000)}
    assert Snapshots(tmp_path / "run", "node", "run", transposed).newest(always) is None


def test_too_little_shared_memory_is_an_error_that_names_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SnapshotError, match="enlarge /dev/shm"):
        Snapshots(tmp_path / "run", "node", "run", state(0))
    assert not (tmp_path / "run" / "node").exists()


def test_what_a_killed_job_left_is_swept_and_what_lives_or_is_recent_is_not(tmp_path: Path) -> None:
    living = Snapshots(tmp_path / "living", "node", "run", state(0))
    for name in ("dead", "recent"):
        (tmp_path / name / "node").mkdir(parents=True)
        (tmp_path / name / "node" / "0.tensors").touch()
    long_ago = time.time() - 2 * LEFT_OVER_SECONDS
    for name in ("dead", "living"):
        for path in (tmp_path / name / "node").iterdir():
            os.utime(path, (long_ago, long_ago))
    Snapshots(tmp_path / "new", "node", "run", state(0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["living", "new", "recent"]
    living.discard()


def test_what_another_process_deletes_meanwhile_costs_no_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Snapshots(tmp_path / "mine", "node", "run", state(0))
    mine.save(10, 0, state(10), [])
    mine.wait()
    others = [tmp_path / "mine" / "other", *(tmp_path / f"{letter}{number}" for letter in "az" for number in range(9))]

    def crowd() -> None:
        for other in others:
            (other / "node").mkdir(parents=True)
            (other / "node" / "0.tensors").touch()
            (other / "0.json").touch()

    def vanish(*_: object) -> None:
        for other in others:
            shutil.rmtree(other, ignore_errors=True)

    def unlinked(path: Path, mode: str) -> IO[bytes]:
        file = builtins.open(path, mode)  # noqa: PTH123, SIM115
        if "mine" not in str(path):
            path.unlink()
        return file

    with monkeypatch.context() as patch:
        crowd()
        patch.setattr(Path, "open", unlinked)  # the files are gone, and the folders not yet
        snapshot.sweep(tmp_path)
    vanish()
    with monkeypatch.context() as patch:
        crowd()
        patch.setattr(fcntl, "flock", vanish)  # as soon as one is looked at, all are gone
        again = Snapshots(tmp_path / "mine", "node", "run", state(0))
    with monkeypatch.context() as patch:
        crowd()
        patch.setattr(json, "loads", lambda text, loads=json.loads: (vanish(), loads(text))[1])
        newest = again.newest(always)
    assert newest
    assert newest.step == 10


def test_a_device_copies_beside_its_work_and_the_header_comes_after_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = copy_late(monkeypatch)
    live = state(10)
    snapshots = Snapshots(tmp_path / "run", "node", "run", live)
    snapshots.save(10, 0, live, [])
    assert snapshots.pending
    with pytest.raises(TimeoutError):
        snapshots.pending.result(timeout=0.2)
    assert not list(tmp_path.glob("run/node/*.json"))
    snapshots.goes_before()  # the update waits for the copy, and the host for neither
    for tensor in live.values():
        tensor.add_(1)
    snapshots.wait()
    newest, loaded = snapshots.newest(always), state(0)
    assert newest
    snapshots.load(newest, loaded)
    assert (newest.step, len(begun)) == (10, 1)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state(10).items())


def test_a_save_right_after_a_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = copy_late(monkeypatch)
    snapshots = Snapshots(tmp_path / "run", "node", "run", state(0))
    snapshots.save(10, 0, state(10), [])
    second = threading.Thread(target=snapshots.save, args=(20, 0, state(20), []))
    second.start()
    second.join(0.2)
    assert len(begun) == 1
    begun[0].make()
    second.join()
    assert len(begun) == 2
    assert (newest := snapshots.newest(always))
    assert newest.step == 10
    begun[1].make()
    snapshots.wait()
    assert (newest := snapshots.newest(always))
    assert newest.step == 20


def test_a_device_that_is_lost_costs_the_snapshot_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = copy_late(monkeypatch)
    snapshots = Snapshots(tmp_path / "run", "node", "run", state(0))
    snapshots.save(10, 0, state(10), [])
    begun[0].make()

    def lost(_: LateCopy) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(LateCopy, "wait", lost)
    monkeypatch.setattr(LateCopy, "goes_before", lost)
    snapshots.save(20, 0, state(20), [])
    snapshots.wait()
    snapshots.goes_before()  # nothing is on its way any more
    assert "could not be kept: CUDA error" in capsys.readouterr().err
    assert (newest := snapshots.newest(always))
    assert newest.step == 10


def test_memory_that_cannot_be_page_locked_is_said_once_and_copied_to_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, locked = copy_late(monkeypatch), []

    def lock_pages(memory: np.ndarray, _device: torch.device) -> Callable[[], None]:
        if locked:
            raise RuntimeError("out of memory")
        locked.append(memory)
        return locked.clear

    monkeypatch.setattr(devices, "lock_pages", lock_pages)
    snapshots = Snapshots(tmp_path / "run", "node", "run", state(0))
    assert locked == []  # what was locked is unlocked again
    assert capsys.readouterr().err.count("cannot be page-locked (out of memory)") == 1
    snapshots.save(10, 0, state(10), [])
    snapshots.wait()
    assert (newest := snapshots.newest(always))
    assert (newest.step, begun) == (10, [])


def test_pages_are_unlocked_with_the_snapshots_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_late(monkeypatch)
    locked: list[int] = []

    def lock_pages(memory: np.ndarray, _device: torch.device) -> Callable[[], None]:
        locked.append(memory.nbytes)
        return lambda: locked.remove(memory.nbytes)

    monkeypatch.setattr(devices, "lock_pages", lock_pages)
    snapshots = Snapshots(tmp_path / "run", "node", "run", state(0))
    assert locked == [snapshots.bytes] * 2
    snapshots.discard()
    assert locked == []


SAVER = """
import sys, torch
from pathlib import Path
from elastic_gpt.snapshot import Snapshots
state = {"model.w": torch.zeros(2_000_000)}
snapshots = Snapshots(Path(sys.argv[1]), "node", "run", state)
for step in range(1, 1_000_000):
    snapshots.save(step, 0, {"model.w": torch.full((2_000_000,), float(step))}, [])
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_snapshot(tmp_path: Path) -> None:
    like = {"model.w": torch.zeros(2_000_000)}
    for delay in (0.11, 0.17, 0.23, 0.31):
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
        )
        assert saver.stdout
        while int(saver.stdout.readline()) < 3:
            pass
        time.sleep(delay)
        saver.send_signal(signal.SIGKILL)
        done = int(saver.communicate()[0].split()[-1])
        snapshots = Snapshots(tmp_path / "run", "node", "run", like)
        newest = snapshots.newest(always)
        assert newest is not None
        assert newest.step >= done - 1  # one may still have been without its checksum
        snapshots.load(newest, like)
        assert like["model.w"].unique().tolist() == [float(newest.step)]
        (tmp_path / "run").rename(tmp_path / f"run-{delay}")
