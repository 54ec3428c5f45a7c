"""state.py: a life begins with the state in memory, on storage or at the start, and never silently with a wrong one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_gpt import state as state_room
from elastic_gpt.checkpoint import CheckpointError, Checkpoints
from elastic_gpt.identity import Run
from elastic_gpt.settings import Resume
from elastic_gpt.snapshot import Snapshots
from elastic_gpt.state import Held, Memory, Restored, broken
from elastic_gpt.storage import Unreachable
from elastic_gpt.world import World
from tests.elastic.worlds import run_world


def restore(
    tensors: dict[str, torch.Tensor],
    snapshots: Snapshots | None,
    checkpoints: Checkpoints,
    run: Run,
    world: World,
    resume: Resume = "auto",
    held: Held | None = None,
) -> Restored:
    """As a life begins: each rank offers what it has, then all restore."""
    memory = Memory(held or Held(), snapshots)
    offers = world.gather(memory.offer(run, world.node))
    return state_room.restore(tensors, memory, offers, checkpoints, run, world, resume)


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((4, 5), value), "optimizer.step.w": torch.tensor(value)}


def hold(folder: Path, step: int, life: int) -> Snapshots:
    """The snapshots of a node, with one snapshot in them."""
    snapshots = Snapshots(folder / "run", "node", "run", state(0), name=f"life-{life}")
    snapshots.save(step, life, state(step), [{"step": step}])
    snapshots.wait()
    return snapshots


def a_run(life: int, branches: list[tuple[int, int]], **more: Any) -> Run:
    """A run in its life number `life`, in the same job as the life before."""
    lives = {f"life-{number}": number for number in range(life)}
    return Run("run", life, branches, **({"lives": lives, "continues": True} | more))


class Away(Checkpoints):
    """Checkpoints on a storage that does not answer."""

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
        restored = restore(live, snapshots, checkpoints, a_run(1, [(0, 0)]), ALONE)
        assert (restored.step, restored.source) == (max(20, stored), expected)
        assert torch.equal(live["model.w"], state(restored.step)["model.w"])
        assert restored.reports == [{"step": restored.step}]


def test_a_run_whose_checkpoints_are_not_where_it_looks_does_not_start_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "other")
    new = restore(state(0), None, checkpoints, a_run(0, []), ALONE)
    assert (new.step, new.source) == (0, "start")
    killed_early = restore(state(0), None, checkpoints, a_run(1, [(0, 0)]), ALONE)
    assert killed_early.source == "start"  # nothing was saved yet
    with pytest.raises(
        CheckpointError, match=r"step 40 of this run was saved in s3://bucket/run, .* in .*other: mount it"
    ):
        restore(state(0), None, checkpoints, a_run(1, [(0, 0)], saved=(40, "s3://bucket/run")), ALONE)


def test_a_store_that_is_away_does_not_matter_while_memory_is_of_the_life_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshots = hold(tmp_path, 20, life=1)
    restored = restore(state(0), snapshots, Away(tmp_path), a_run(2, [(0, 0), (1, 10)]), ALONE)
    assert restored.step == 20
    assert "no route; the run goes on from memory" in capsys.readouterr().err


def test_a_store_that_is_away_may_hold_what_an_older_memory_does_not(tmp_path: Path) -> None:
    snapshots = hold(tmp_path, 20, life=1)  # life 2 began at step 40, from a checkpoint, and all its memory is lost
    for held, run in ((snapshots, a_run(3, [(0, 0), (1, 10), (2, 40)])), (None, a_run(0, []))):
        with pytest.raises(Unreachable):
            restore(state(0), held, Away(tmp_path), run, ALONE)


def test_memory_of_a_life_that_the_ledger_does_not_know_or_of_before_a_roll_back_is_not_taken(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(10, state(10), [])
    checkpoints.finished(wait=True)
    (tmp_path / "metrics.jsonl").write_text("20 steps\n")
    snapshots = Snapshots(tmp_path / "run", "node", "run", state(0), name="life-0", history=tmp_path / "metrics.jsonl")
    snapshots.save(20, 0, state(20), [])
    snapshots.wait()
    for more, step in (
        ({"history_bytes": 9}, 20),
        ({"history_bytes": 8}, 10),  # the files were put back to an earlier moment of the same life
        ({"history_bytes": 9, "lives": {"another": 0}}, 10),  # and to one before it, after which there was another
        ({"history_bytes": 9, "lives": {}}, 10),
    ):
        assert restore(state(0), snapshots, checkpoints, a_run(1, [(0, 0)], **more), ALONE).step == step


@pytest.mark.parametrize(
    ("resume", "deleted", "continues", "step", "told"),
    [
        ("auto", False, False, 50, "memory is taken, for the run was killed there"),
        ("auto", True, False, 30, "storage is taken, for step 40 was saved and has been deleted"),
        ("storage", False, False, 40, "storage is taken, as --resume storage says"),
        ("memory", True, False, 50, "memory is taken, as --resume memory says"),
        ("auto", True, True, 50, ""),  # a membership change is not a wish to go back
        ("storage", False, True, 50, ""),
    ],
)
def test_where_memory_is_ahead_of_storage_one_is_taken_for_a_reason_that_is_told(
    tmp_path: Path, resume: Resume, deleted: bool, continues: bool, step: int, told: str
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=5)
    for saved in (30,) if deleted else (30, 40):
        checkpoints.save(saved, state(saved), [])
        checkpoints.finished(wait=True)
    run = a_run(1, [(0, 0)], saved=(40, str(checkpoints.storage)), continues=continues)
    restored = restore(state(0), hold(tmp_path, 50, life=0), checkpoints, run, ALONE, resume)
    assert restored.step == step
    assert told in restored.choice
    assert bool(told) == bool(restored.choice)


def test_memory_that_is_asked_for_and_not_there_is_missed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no node holds this run in memory: leave --resume memory out"):
        restore(state(0), None, Checkpoints(tmp_path), a_run(1, [(0, 0)], continues=False), ALONE, "memory")


def test_the_end_that_diverged_is_not_taken_again_from_storage_either(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=5, run=a_run(0, [], name="life-0"))
    for step in (30, 40):
        checkpoints.save(step, state(step), [])
        checkpoints.finished(wait=True)
    again = Checkpoints(tmp_path, keep=5, run=a_run(1, [(0, 0), (1, 35)]))
    assert again.newest_step() == 30
    again.save(40, state(41), [])  # and when it is reached again, it is the new one
    again.finished(wait=True)
    assert torch.equal(again.read(40, "model")["model.w"], state(41)["model.w"])


def test_what_is_not_finite_is_named_and_large_numbers_are_finite() -> None:
    assert broken(state(1)) is None
    assert broken({"model.w": torch.full((9,), 3e38)}) is None  # their sum is not
    for odd in (float("nan"), float("inf"), -float("inf")):
        assert broken(state(1) | {"optimizer.m": torch.tensor([1.0, odd])}) == "optimizer.m"


def on_each_rank(world: World, folder: Path) -> tuple[int, str, float]:
    snapshots = hold(folder / str(world.rank), 10 * (world.rank + 1), life=0) if world.rank < 2 else None
    live = state(0)
    restored = restore(live, snapshots, Away(folder), a_run(1, [(0, 0)]), world)
    return restored.step, restored.source, float(live["model.w"][0, 0])


HELD = {0: Held(29, 0, [{"step": 29}]), 1: Held(30, 0, [{"step": 30}]), 2: Held()}


def with_a_survivor(world: World, folder: Path, held: dict[int, Held], branches: list) -> tuple:
    mine = held[world.rank]
    snapshots = hold(folder / str(world.rank), 10, life=0)
    live = state(mine.step if mine.step >= 0 else 0)
    before = live["model.w"].data_ptr()
    checkpoints = Checkpoints(folder / "checkpoints")
    restored = restore(live, snapshots, checkpoints, a_run(len(branches), branches), world, held=mine)
    assert live["model.w"].data_ptr() == before
    assert (mine.step, mine.life, mine.reports) == (restored.step, len(branches), restored.reports)
    return restored.step, restored.source, restored.reports, float(live["model.w"][0, 0])


def test_the_newest_that_a_survivor_has_in_its_tensors_is_given_to_all(tmp_path: Path) -> None:
    for rank in range(3):
        (tmp_path / str(rank)).mkdir(mode=0o700)
    expected = (30, "worker of node single", [{"step": 30}], 30.0)
    assert run_world(3, with_a_survivor, tmp_path, HELD, [(0, 0)]) == [expected] * 3
    # No worker takes a state of a world that the run went back from.
    abandoned = (10, "snapshot of node node", [{"step": 10}], 10.0)
    assert run_world(3, with_a_survivor, tmp_path, HELD, [(0, 0), (1, 20)])[2] == abandoned


def interrupted(world: World) -> int:
    held, live = Held(29 + world.rank, 0), state(29 + world.rank)
    object.__setattr__(world, "broadcast", lambda *_: 1 / 0)  # it is frozen
    with pytest.raises(ZeroDivisionError):
        restore(live, None, Away(Path("away")), a_run(1, [(0, 0)]), world, held=held)
    return held.step


def test_a_state_that_is_half_overwritten_is_held_by_nobody() -> None:
    assert run_world(2, interrupted) == [-1, 30]


def test_all_ranks_take_the_newest_memory_there_is(tmp_path: Path) -> None:
    for rank in range(3):
        (tmp_path / str(rank)).mkdir(mode=0o700)
    assert run_world(3, on_each_rank, tmp_path) == [(20, "snapshot of node node", 20.0)] * 3
