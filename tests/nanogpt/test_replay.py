"""replay.py: steps that are trained again are the same, and later changes of the run are found."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import TINY, elastic_gpt


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--steps=24", "--checkpoint.interval=8", "--checkpoint.keep=9", "--evaluate.interval=0"]
    elastic_gpt("train", "debug_cpu", *TINY, *flags, "--data.dir", data, "--run-dir", folder)
    return folder


def test_a_run_that_nobody_touched_is_the_same_and_is_only_read(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = elastic_gpt("replay", run, "--to", "20")
    assert done.stdout.splitlines()[-1] == "the same: 12 steps from 8 to 20, sequences and losses, bit for bit"
    assert elastic_gpt("replay", run, "--from", "16").stdout.endswith("parameters and moments, bit for bit\n")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_of_a_version_that_sums_in_another_way_is_not_taken_for_a_forged_one(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for manifest in (copy / "checkpoints").rglob("MANIFEST.json"):
        old = json.loads(manifest.read_text())
        assert old.pop("exact_sums") == 2
        manifest.write_text(json.dumps(old | {"before": None}))
    metrics = copy / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[9]["loss"] += 1e-6
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert elastic_gpt("replay", copy).stdout.splitlines()[-2:] == [
        "not compared bit for bit: the version that saved the checkpoint of step 8 sums gradients in another way",
        "the same: 16 steps from 8 to 24, sequences and losses, up to float sums",
    ]


def test_a_run_that_was_given_more_steps_is_replayed_with_the_settings_of_then(
    run: Path, tmp_path: Path, data: Path
) -> None:
    longer = shutil.copytree(run, tmp_path / "run")
    flags = ["--steps=40", "--checkpoint.interval=8", "--checkpoint.keep=9", "--evaluate.interval=0"]
    elastic_gpt("train", "debug_cpu", *TINY, *flags, "--data.dir", data, "--run-dir", longer)
    for stretch in (["--to", "24"], ["--from", "24"]):
        assert "the same: 16 steps from " in elastic_gpt("replay", longer, *stretch).stdout
    told = elastic_gpt("replay", longer, code=2).stderr
    assert "steps became 40 at step 24, before it was 24: take --to 24, or --from a later step" in told


@pytest.mark.parametrize(("field", "value"), [("loss", 1.0), ("sequence_hash", "0" * 16)])
def test_a_line_that_was_changed_is_found(run: Path, tmp_path: Path, field: str, value: object) -> None:
    changed = shutil.copytree(run, tmp_path / "run") / "metrics.jsonl"
    lines = [json.loads(line) for line in changed.read_text().splitlines()]
    lines[9][field] = value
    changed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "NOT the same: step 10 " in elastic_gpt("replay", changed.parent, "--to", "12", code=1).stdout


def test_a_checkpoint_that_was_exchanged_is_found(run: Path, tmp_path: Path) -> None:
    manifest = shutil.copytree(run, tmp_path / "run") / "checkpoints/step_00000008/MANIFEST.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"reports": []}))
    done = elastic_gpt("replay", tmp_path / "run", code=2)
    assert "step_00000016 followed another checkpoint of step 8 than is there" in done.stderr


def test_a_chain_in_order_is_one_line_and_what_is_missing_in_it_is_said(run: Path, tmp_path: Path) -> None:
    assert elastic_gpt("replay", run, "--verify").stdout == (
        f"in order: 3 checkpoints in {run}/checkpoints, and the ledger up to the last of them\n"
    )
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints/step_00000008")
    manifest = copy / "checkpoints/step_00000024/MANIFEST.json"
    old = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({name: old[name] for name in old if name not in ("before", "ledger")}))
    assert elastic_gpt("replay", copy, "--verify").stdout.splitlines()[:2] == [
        "not checked: step_00000016 followed step_00000008, which is no longer there",
        "not checked: step_00000024 does not say which events came before it: an older version wrote it",
    ]


def test_an_event_that_was_changed_and_a_file_that_was_damaged_are_found(run: Path, tmp_path: Path) -> None:
    ledger = shutil.copytree(run, tmp_path / "run") / "ledger.jsonl"
    written = ledger.read_text()
    assert '"world_size": 1' in written
    ledger.write_text(written.replace('"world_size": 1', '"world_size": 2'))
    done = elastic_gpt("replay", ledger.parent, "--verify", code=2)
    assert "ledger.jsonl is not what it was when " in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    ledger.write_text(written)
    (ledger.parent / "checkpoints/step_00000016/model.safetensors").write_bytes(b"other")
    done = elastic_gpt("replay", ledger.parent, "--verify", code=2)
    assert "step_00000016 is damaged: model.safetensors is not what was written" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "9"], "there is no checkpoint of step 9: take one of 8, 16, 24"),
        (["--from", "16", "--to", "16"], "from step 16 there is no step 16 to come to"),
        (["--to", "99"], "from step 8 there is no step 99 to come to: take one up to 24"),
    ],
)
def test_a_stretch_that_is_not_there_is_one_line(run: Path, words: list[str], message: str) -> None:
    assert message in elastic_gpt("replay", run, *words, code=2).stderr
