"""identity.py: a renamed run directory is the same run, a copy is another."""

import re
import shutil
from pathlib import Path

import pytest

from elastic_gpt.identity import Run, directory, same_directory


def test_a_renamed_directory_is_the_same_and_a_copied_one_is_another(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    before = directory(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "c")
    assert same_directory(directory(tmp_path / "c"), before)
    assert not same_directory(directory(tmp_path / "b"), before)


def test_a_number_that_is_used_again_or_of_another_volume_is_not_the_same(tmp_path: Path) -> None:
    here = directory(tmp_path)
    assert not same_directory(here, here | {"birth": 1.0})
    assert not same_directory(here, here | {"device": -1})
    assert same_directory(here, here | {"device": -1, "machine": "another"})  # a volume has other numbers there
    assert same_directory(here, here | {"birth": None})  # not every file system knows it


RUN = Run(
    "mine", 2, [(0, 0), (1, 40)], name="now", lives={"first": 0, "second": 1}, ancestors=("theirs",),
    own="/b/checkpoints", left=frozenset({"/shared"}),
)  # fmt: skip


@pytest.mark.parametrize(
    ("owner", "life", "place", "refusal"),
    [
        ("mine", "first", "/shared", None),
        ("mine", "now", "/shared", None),
        ("mine", None, "/shared", None),  # made by 0.1.0
        ("theirs", "first", "/b/checkpoints", None),
        ("theirs", "first", "/shared", "leave --checkpoint.dir out, .*cp -r /shared/step_00000040 /b/checkpoints/"),
        ("mine", "other", "/shared", "a life that this run's ledger does not know"),
        ("theirs", "other", "/b/checkpoints", "a life that this run's ledger does not know"),
        ("somebody", "first", "/elsewhere", "holds checkpoints of another run"),
        ("somebody", "first", "/b/checkpoints", "files of two runs .*delete /b/checkpoints/step_00000040"),
    ],
)  # fmt: skip
def test_a_checkpoint_is_its_runs(owner: str, life: str | None, place: str, refusal: str | None) -> None:
    found = RUN.refusal({"run_id": owner, "life": life, "step": 40}, place)
    if refusal is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(refusal, found)


def test_a_ledger_made_by_hand_for_a_lost_one_takes_the_checkpoints_of_its_id() -> None:
    before = {"run_id": "mine", "life": "other", "step": 40}
    assert Run("mine", 0, []).refusal(before, "/shared") is None
    then = Run("mine", 1, [(0, 40)], lives={"first": 0})
    assert then.refusal(before, "/shared") is None
    assert then.refusal(before | {"step": 50}, "/shared") is not None
