"""A checkpoint is whole or absent, whatever happens while it is written."""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from elastic_gpt import checkpoint, storage
from elastic_gpt.checkpoint import CheckpointError, Checkpoints, load_model_weights
from elastic_gpt.identity import Run


def state(value: float) -> dict[str, torch.Tensor]:
    return {
        "model.w": torch.full((4, 5), value),
        "model.b": torch.full((5,), value),
        "optimizer.step.w": torch.tensor(value),
    }


def write(folder: Path, *steps: int, keep: int = 5) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, state(step), [{"step": step}])
        assert checkpoints.finished(wait=True) == step
    return checkpoints


def test_what_is_loaded_is_what_was_saved_and_old_ones_are_dropped(tmp_path: Path) -> None:
    checkpoints = write(tmp_path, 10, 20, 30, keep=2)
    assert checkpoints.steps() == [20, 30]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000020", "step_00000030"]
    live = state(0)
    assert checkpoints.load(30, live) == [{"step": 30}]
    assert all(torch.equal(live[name], tensor) for name, tensor in state(30).items())


class Killed(BaseException):
    """Stands for a kill -9: the code after it does not run."""


@pytest.mark.parametrize("name", ["save_file", "_flush", "_sha256", "rename", "unlink"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    checkpoints = write(tmp_path, 10, keep=1)
    owner: object = {"rename": Path, "unlink": Path, "_flush": storage}.get(name, checkpoint)
    real: Callable[..., object] = getattr(owner, name)
    calls = []

    def killed(*args: object, **more: object) -> object:
        calls.append(args)
        if len(calls) == call:
            monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # nothing is tidied up
            raise Killed
        return real(*args, **more)

    monkeypatch.setattr(owner, name, killed)
    checkpoints.save(20, state(20), [{"step": 20}])
    assert checkpoints.pending
    died = isinstance(checkpoints.pending.exception(), Killed)
    monkeypatch.undo()
    assert died == (len(calls) >= call)

    again = Checkpoints(tmp_path)
    newest = again.newest_step()
    assert newest in (10, 20)
    live = state(0)
    again.load(newest, live)
    assert all(torch.equal(live[tensor], value) for tensor, value in state(newest).items())
    again.save(30, state(30), [{"step": 30}])  # the remains of the killed save do no harm
    assert again.finished(wait=True) == 30
    assert again.newest_step() == 30


def test_nodes_that_save_one_state_at_once_leave_it_whole_at_any_moment(tmp_path: Path) -> None:
    nodes = [Checkpoints(tmp_path, keep=1) for _ in range(3)]
    for step in range(10, 200, 10):
        for node in nodes:
            node.save(step, state(step), [{"step": step}])
        while any(node.pending and not node.pending.done() for node in nodes):
            if step in (reader := Checkpoints(tmp_path)).steps():
                assert reader.load(step, state(0))
        assert [node.finished(wait=True) for node in nodes] == [step] * 3
        assert Checkpoints(tmp_path).newest_step() == step
        (folder,) = tmp_path.iterdir()
        assert folder.name == Checkpoints.name(step)
        files = sorted(path.name for path in folder.iterdir())
        assert files == ["MANIFEST.json", "model.safetensors", "optimizer.safetensors"]


def test_a_checkpoint_whose_file_was_deleted_while_it_was_saved_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, real, files = write(tmp_path, 10, keep=1), checkpoint.save_tensors, []

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if files:  # as another node does whose disk is full
            (path.parent / "model.safetensors").unlink()
        files.append(path)
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_tensors", save)
    checkpoints.save(20, state(20), [])
    assert "model.safetensors was deleted by another process" in str(checkpoints.finished(wait=True))
    assert Checkpoints(tmp_path).newest_step() == 10


def test_without_the_rename_there_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = write(tmp_path, 10, 20)
    manifest = tmp_path / "step_00000020" / "MANIFEST.json"
    manifest.rename(manifest.with_suffix(".json.partial"))
    assert checkpoints.newest_step() == 10


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    checkpoints = write(tmp_path, 10, 20)
    tensors = tmp_path / "step_00000020" / "model.safetensors"
    if damage == "flip":
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(content)
    elif damage == "cut":
        os.truncate(tensors, 50)
    elif damage == "missing":
        tensors.unlink()
    else:
        (tmp_path / "step_00000020" / "MANIFEST.json").write_text("{}")
    assert checkpoints.newest_step() == 10
    assert "step_00000020 is damaged" in capsys.readouterr().err


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_silently(tmp_path: Path) -> None:
    checkpoints = write(tmp_path, 10)
    os.truncate(tmp_path / "step_00000010" / "optimizer.safetensors", 3)
    with pytest.raises(CheckpointError, match="restore one from a backup"):
        checkpoints.newest_step()
    assert checkpoints.newest_step(newer_than=12) is None  # a newer snapshot is there, so damage does not matter


def test_damaged_newer_checkpoints_do_not_push_out_a_good_one(tmp_path: Path) -> None:
    write(tmp_path, 300, 400)
    for step in (300, 400):
        os.truncate(tmp_path / f"step_{step:08d}" / "model.safetensors", 3)
    write(tmp_path, 250, keep=1)
    assert Checkpoints(tmp_path).newest_step() == 250


def test_a_folder_of_the_users_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 10)
    shutil.copytree(tmp_path / "step_00000010", tmp_path / "step_00000010.bak")
    assert Checkpoints(tmp_path).steps() == [10]


def test_a_full_disk_is_told_and_the_next_save_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = write(tmp_path, 10)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "_flush", full)
    checkpoints.save(20, state(20), [{"step": 20}])
    error = checkpoints.finished(wait=True)
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC
    monkeypatch.undo()
    assert checkpoints.newest_step() == 10
    assert not (tmp_path / "step_00000020").exists()  # deleted, since its room is needed
    checkpoints.save(30, state(30), [{"step": 30}])
    assert checkpoints.finished(wait=True) == 30


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_fail_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = write(tmp_path, 10, keep=1)

    def denied(_: str) -> None:
        raise PermissionError("AccessDenied: s3:DeleteObject")

    monkeypatch.setattr(checkpoints.storage, "delete", denied)
    checkpoints.save(20, state(20), [])
    assert checkpoints.finished(wait=True) == checkpoints.saved == 20
    assert "step_00000010 could not be deleted" in capsys.readouterr().err


def test_a_failed_save_is_owed_until_one_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = write(tmp_path, 10)
    monkeypatch.setattr(storage, "_flush", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    checkpoints.save(20, state(20), [])
    assert isinstance(checkpoints.finished(wait=True), OSError)
    assert checkpoints.owed
    monkeypatch.undo()
    checkpoints.save(21, state(21), [])
    assert not checkpoints.owed  # it is under way
    assert checkpoints.finished(wait=True) == 21
    assert not checkpoints.owed


def test_another_runs_checkpoints_are_neither_taken_nor_deleted(tmp_path: Path) -> None:
    def run(name: str) -> Checkpoints:
        return Checkpoints(tmp_path, keep=1, run=Run(name, 0, []))

    late = run("late")
    assert late.newest_step() is None  # both runs start and find no checkpoints
    first = run("first")
    first.save(10, state(10), [])
    assert first.finished(wait=True) == 10
    for taken in (lambda: run("late").newest_step(), lambda: run("late").newest_step(newer_than=50)):
        with pytest.raises(
            CheckpointError, match=r"another run \(first\): give this one a --checkpoint.dir of its own"
        ):
            taken()
    for step in (10, 20):
        late.save(step, state(0), [])
        with pytest.raises(CheckpointError, match="another run"):
            late.finished(wait=True)
    assert run("first").newest_step() == 10
    assert Checkpoints(tmp_path).newest_step() == 10  # without a run, any checkpoint can be read


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    checkpoints = write(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"'model\.b' is in only one"):
        checkpoints.load(10, {name: tensor for name, tensor in state(0).items() if name != "model.b"})


def test_weights_are_found_by_the_run_directory_alone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run directory"):
        load_model_weights(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_model_weights(tmp_path)
    write(tmp_path / "checkpoints", 10)
    step, weights = load_model_weights(tmp_path)
    assert step == 10
    assert sorted(weights) == ["b", "w"]


def test_a_manifest_that_another_node_wrote_meanwhile_stays_for_the_next_is_chained_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, quick = write(tmp_path, 10), Checkpoints(tmp_path, 5)
    files = slow.files

    def looks(step: int) -> dict[str, int]:  # when its files are written, and its manifest is not
        for other in (20, 30):
            quick.save(other, state(other), [{"step": other, "by": "the quick one"}])
            assert quick.finished(wait=True) == other
        return files(step)

    monkeypatch.setattr(slow, "files", looks)
    slow.save(20, state(20), [{"step": 20}])
    assert slow.finished(wait=True) == 20
    assert Checkpoints(tmp_path)._manifest(20)["reports"] == [{"step": 20, "by": "the quick one"}]
    assert Checkpoints(tmp_path).check_chain() == [
        "step_00000010 does not say which events came before it: an older version wrote it",
        "step_00000020 does not say which events came before it: an older version wrote it",
        "step_00000030 does not say which events came before it: an older version wrote it",
    ]


def test_a_checkpoint_that_a_later_life_went_back_from_meanwhile_counts_for_nothing_and_pushes_out_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, later = Run("run", 0, [], name="a"), Run("run", 1, [(0, 0), (1, 5)], name="b", lives={"a": 0})
    tensors, gate = {"model.w": torch.ones(3), "optimizer.step.w": torch.tensor(1.0)}, threading.Event()
    checkpoints = Checkpoints(tmp_path, keep=1, run=first)
    checkpoints.save(5, tensors, [])
    assert checkpoints.finished(wait=True) == 5
    save = checkpoint.save_tensors
    monkeypatch.setattr(checkpoint, "save_tensors", lambda *args: (gate.wait(60.0), save(*args)))
    checkpoints.save(10, tensors, [])
    checkpoints.begin_life(later)
    gate.set()
    assert checkpoints.finished(wait=True) is None
    assert (checkpoints.saved, checkpoints.steps(), checkpoints.newest_step()) == (None, [5, 10], 5)
    checkpoints.save(5, tensors, [])
    assert checkpoints.finished(wait=True) == 5
