"""Where a life of the run begins: in memory, on storage, or at the start; and never silently at the wrong one."""

from pathlib import Path

import pytest
import torch

from elastic_gpt.checkpoint import CheckpointError, Checkpoints
from elastic_gpt.snapshot import Snapshots
from elastic_gpt.state import Run, restore
from elastic_gpt.storage import Unreachable
from elastic_gpt.world import World
from tests.elastic.worlds import run_world


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((4, 5), value), "optimizer.step.w": torch.tensor(value)}


def hold(folder: Path, step: int, life: int) -> Snapshots:
    """A node's memory with one snapshot."""
    snapshots = Snapshots(folder / "run", "node", "run", state(0))
    snapshots.save(step, life, state(step), [{"step": step}])
    snapshots.wait()
    return snapshots


class Away(Checkpoints):
    """Checkpoints in a place that does not answer."""

    def newest_step(self, newer_than: int = -1) -> int | None:  # noqa: ARG002
        raise Unreachable(f"cannot list {self.storage}: no route")


ALONE = World(0, 1, 0, "node", torch.device("cpu"), False)


def test_the_newer_of_memory_and_storage_is_taken(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=5)
    snapshots = hold(tmp_path, 20, life=0)
    for stored, expected in (
        (10, "snapshot of node node"),
        (20, "snapshot of node node"),
        (30, "checkpoint step_00000030"),
    ):
        checkpoints.save(stored, state(stored), [{"step": stored}])
        assert checkpoints.finished(wait=True) == stored
        live = state(0)
        restored = restore(live, snapshots, checkpoints, Run("run", 1, [(0, 0)]), ALONE)
        assert (restored.step, restored.source) == (max(20, stored), expected)
        assert torch.equal(live["model.w"], state(restored.step)["model.w"])
        assert restored.reports == [{"step": restored.step}]


def test_a_run_whose_checkpoints_are_not_where_it_looks_does_not_start_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "other")
    new = restore(state(0), None, checkpoints, Run("run", 0, []), ALONE)
    assert (new.step, new.source) == (0, "start")
    killed_early = restore(state(0), None, checkpoints, Run("run", 1, [(0, 0)]), ALONE)
    assert killed_early.source == "start"  # nothing was saved yet
    with pytest.raises(
        CheckpointError, match=r"step 40 of this run was saved in s3://bucket/run, .* in .*other: mount it"
    ):
        restore(state(0), None, checkpoints, Run("run", 1, [(0, 0)], saved=(40, "s3://bucket/run")), ALONE)


def test_a_store_that_is_away_does_not_matter_while_memory_is_of_the_life_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshots = hold(tmp_path, 20, life=1)
    restored = restore(state(0), snapshots, Away(tmp_path), Run("run", 2, [(0, 0), (1, 10)]), ALONE)
    assert restored.step == 20
    assert "no route; the run goes on from memory" in capsys.readouterr().err


def test_a_store_that_is_away_may_hold_what_an_older_memory_does_not(tmp_path: Path) -> None:
    snapshots = hold(tmp_path, 20, life=1)  # life 2 began at step 40, from a checkpoint, and all its memory is lost
    for held, run in ((snapshots, Run("run", 3, [(0, 0), (1, 10), (2, 40)])), (None, Run("run", 0, []))):
        with pytest.raises(Unreachable):
            restore(state(0), held, Away(tmp_path), run, ALONE)


def on_each_rank(world: World, folder: Path) -> tuple[int, str, float]:
    snapshots = hold(folder / str(world.rank), 10 * (world.rank + 1), life=0) if world.rank < 2 else None
    live = state(0)
    restored = restore(live, snapshots, Away(folder), Run("run", 1, [(0, 0)]), world)
    return restored.step, restored.source, float(live["model.w"][0, 0])


def test_all_ranks_take_the_newest_memory_there_is(tmp_path: Path) -> None:
    for rank in range(3):
        (tmp_path / str(rank)).mkdir(mode=0o700)
    assert run_world(3, on_each_rank, tmp_path) == [(20, "snapshot of node node", 20.0)] * 3
