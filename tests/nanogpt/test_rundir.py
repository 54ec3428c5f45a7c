"""rundir.py: copies, two jobs at once, older and newer versions, and settings that a run may change."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from model_zoo.nanogpt.config import PRESETS
from tests.conftest import PATIENCE, TINY, elastic_gpt, environment, errors, events, metrics

OLD = Path(__file__).with_name("old_run")


def arguments(data: Path, run: Path, *more: str) -> list[str]:
    flags = ["--evaluate.interval=0", "--checkpoint.interval=50", f"--data.dir={data}", f"--run-dir={run}"]
    return ["debug_cpu", *TINY, *flags, *more]


@pytest.mark.slow
def test_one_job_at_a_time_and_a_copy_has_its_own_files_while_a_renamed_run_has_its_memory(
    data: Path, tmp_path: Path
) -> None:
    a, b, live, c = (tmp_path / name for name in ("a", "b", "live", "c"))
    command = [sys.executable, "-m", "elastic_gpt.cli", "train", *arguments(data, a, "--steps=100000")]
    first = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    try:
        while len(metrics(a)) < 75:
            assert first.poll() is None
        second = arguments(data, a, "--steps=90")
        for words in (["train", *second], ["launch", "--nodes=2", "--", "train", *second]):
            refused = elastic_gpt(*words, code=2)
            assert re.fullmatch(
                rf"error: run directory .*a is in use \(by process {first.pid} on .*\): .*end that job first.*\n",
                refused.stderr,
            )
        assert first.poll() is None
        shutil.copytree(a, live)  # as it was in the middle of a life
    finally:
        first.kill()
        first.wait()
    shutil.copytree(a, b)
    a.rename(c)
    at = [len(metrics(run)) for run in (live, b, c)]
    # What was committed when it was killed or copied: the one that was being written is not.
    stored = [max(run.glob("checkpoints/step_*/MANIFEST.json")).parent.name for run in (live, b, c)]
    for run, number, checkpoint in zip((live, b, c), at, stored, strict=True):
        done = elastic_gpt("train", *arguments(data, run, f"--steps={number + 20}"))
        (restored,) = events(run, "restored")[1:]
        if run == c:  # at once: the claim of a killed job on this machine has expired
            assert restored["source"] == "snapshot of node single"
            if restored["step"] > int(checkpoint.removeprefix("step_")):  # else storage had as much
                assert "memory is taken, for the run was killed there" in done.stdout
        else:
            assert restored["source"] == f"checkpoint {checkpoint}"
            assert f"{run} is a copy of run {events(run, 'created')[0]['run_id']}" in done.stdout
            assert events(run, "copied")[0]["copied_from"] == events(run, "created")[0]["run_id"]
        assert [line["step"] for line in metrics(run)] == list(range(1, number + 21))
        assert not (run / "claim.json").exists()


def test_a_copy_does_not_share_checkpoints_and_the_cure_works_as_it_is_printed(data: Path, tmp_path: Path) -> None:
    place = f"--checkpoint.dir={tmp_path / 'shared'}"
    elastic_gpt("train", *arguments(data, tmp_path / "a", "--steps=20", place))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    refused = elastic_gpt("train", *arguments(data, tmp_path / "b", "--steps=30", place), code=2)
    assert errors(refused).startswith(
        f"error: {tmp_path / 'shared'} holds the checkpoints of the run that this one was copied"
    )
    assert errors(refused).count("\n") == 1
    cure = re.search(r"\((mkdir .*)\)", refused.stderr)
    assert cure
    subprocess.run(cure[1], shell=True, check=True)
    elastic_gpt("train", *arguments(data, tmp_path / "b", "--steps=30"))
    assert events(tmp_path / "b", "restored")[-1]["step"] == 20
    elastic_gpt("train", *arguments(data, tmp_path / "a", "--steps=30", place))  # nothing of its was touched


def test_a_run_directory_that_was_put_back_does_not_take_what_was_saved_since(data: Path, tmp_path: Path) -> None:
    run, place = tmp_path / "run", f"--checkpoint.dir={tmp_path / 'shared'}"
    elastic_gpt("train", *arguments(data, run, "--steps=20", place))
    before = {name: (run / name).read_bytes() for name in ("ledger.jsonl", "metrics.jsonl")}
    elastic_gpt("train", *arguments(data, run, "--steps=40", place))
    for name, content in before.items():  # in place, as a volume is rolled back: the folder is the same
        (run / name).write_bytes(content)
    refused = elastic_gpt("train", *arguments(data, run, "--steps=50", place), code=2)
    assert "holds step 40 of a life that this run's ledger does not know" in refused.stderr
    assert errors(refused).count("\n") == 1
    assert (run / "metrics.jsonl").read_bytes() == before["metrics.jsonl"]


def test_a_relative_place_of_checkpoints_is_below_the_run_from_everywhere(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, folder in enumerate(("x", "y")):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        elastic_gpt("train", *arguments(data, tmp_path / "run", f"--steps={10 * number + 10}", "--checkpoint.dir=kept"))
    assert events(tmp_path / "run", "restored")[-1]["step"] == 10
    assert (tmp_path / "run" / "kept" / "step_00000020").is_dir()
    assert "model of step 20" in elastic_gpt("generate", "../run", "--prompt=a", "--max-new-tokens=2").stderr


def old_run(folder: Path) -> list[str]:
    """A copy of a run of 0.1.0, and the command that went on with it then."""
    shutil.copytree(OLD, folder)
    return [
        *("train", "debug_cpu", f"--data.dir={folder / 'data'}", f"--run-dir={folder / 'run'}", "--steps=9"),
        *("--model.n-layer=1", "--model.n-head=1", "--model.n-embd=8", "--model.block-size=16", "--device=cpu"),
        *("--checkpoint.interval=3", "--checkpoint.keep=2", "--evaluate.sequences=8", "--global-batch=4"),
        *("--micro-batch=2", "--observe.tensorboard=false"),
    ]


def test_a_run_of_0_1_0_goes_on_as_it_did_in_0_1_0(tmp_path: Path) -> None:
    done = elastic_gpt(*old_run(tmp_path / "old"))
    run = tmp_path / "old" / "run"
    assert errors(done) == ""
    expected = [json.loads(line) for line in (OLD / "continued.jsonl").read_text().splitlines()]
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 10))
    for line, then in zip(lines[6:], expected, strict=True):
        assert (line["sequence_hash"], line["lr"]) == (then["sequence_hash"], then["lr"])
        assert line["loss"] == pytest.approx(then["loss"], abs=1e-4)
    (changed,) = events(run, "settings_changed")
    assert changed["changes"] == {"steps": [6, 9], "device": ["auto", "cpu"]}  # and nothing that 0.1.0 did not know
    assert "model of step 9" in elastic_gpt("generate", run, "--prompt=The", "--max-new-tokens=2").stderr


def test_a_setting_that_the_run_did_not_know_has_its_default_and_no_other(tmp_path: Path) -> None:
    words = old_run(tmp_path / "old")
    path = tmp_path / "old" / "run" / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    del settings["model"]["dropout"]  # as if an older version had made the run
    path.write_text(yaml.safe_dump(settings))
    refused = elastic_gpt(*words, "--model.dropout=0.5", code=2)
    assert "has model.dropout=0.0, not 0.5" in refused.stderr
    elastic_gpt(*words)


def test_a_preset_that_decides_more_than_it_did_leaves_an_older_run_as_it_is(tmp_path: Path) -> None:
    words = old_run(tmp_path / "old")
    preset = tmp_path / "newer.yaml"
    settings = yaml.safe_load((PRESETS / "debug_cpu.yaml").read_text())
    settings["model"]["activation"] = "gelu_erf"
    preset.write_text(yaml.safe_dump(settings))
    words[1] = str(preset)
    refused = elastic_gpt(*words, "--model.activation=gelu_erf", code=2)
    assert "has model.activation=gelu, not gelu_erf" in refused.stderr
    elastic_gpt(*words)
    assert yaml.safe_load((tmp_path / "old" / "run" / "config.yaml").read_text())["model"]["activation"] == "gelu"


@pytest.mark.parametrize("file", ["config.yaml", "checkpoints/step_00000006/MANIFEST.json"])
def test_what_a_newer_version_made_is_refused_with_the_version_that_is_needed(tmp_path: Path, file: str) -> None:
    words = old_run(tmp_path / "old")
    path = tmp_path / "old" / "run" / file
    facts = yaml.safe_load(path.read_text()) | {"format_version": 2, "writer": "elastic-gpt 7.0.0"}
    path.write_text(json.dumps(facts))
    before = (tmp_path / "old" / "run" / "metrics.jsonl").read_bytes()
    for command in (words, ["generate", tmp_path / "old" / "run", "--prompt=a"]):
        done = subprocess.run(
            [sys.executable, "-m", "elastic_gpt.cli", *map(str, command)],
            capture_output=True, text=True, env=environment(), timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert done.returncode in (1, 2)
        assert "has format_version 2" in done.stderr
        assert done.stderr.endswith("install elastic-gpt 7.0.0 or later\n")
        assert errors(done).count("\n") == 1
    assert (tmp_path / "old" / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("what", ["a file", "a loop", "a folder in its place"])
def test_an_impossible_run_directory_is_one_line(data: Path, tmp_path: Path, what: str) -> None:
    run = tmp_path / "a" / "run"
    if what == "a file":
        run.parent.touch()
    elif what == "a loop":
        run.parent.symlink_to("a")
    else:
        (run / "config.yaml").mkdir(parents=True)
    done = elastic_gpt("train", *arguments(data, run, "--steps=20"), code=2)
    assert re.fullmatch(r"error: cannot (read|write) .*: choose another --run-dir\n", done.stderr)


def test_a_folder_of_prepared_data_is_refused_as_a_run_directory(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    before = sorted(path.name for path in (tmp_path / "data").iterdir())
    done = elastic_gpt("train", *arguments(tmp_path / "data", tmp_path / "data", "--steps=1"), code=2)
    assert "holds prepared data: name a folder of its own for the run with --run-dir" in errors(done)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == before
