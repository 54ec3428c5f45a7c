"""The training script: alone and under torchrun, interrupted and resumed, always the same run."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from elastic_gpt.checkpoint import Checkpoints
from elastic_gpt.settings import parse
from elastic_gpt.snapshot import Snapshots, shared_memory
from elastic_gpt.world import PeerLost
from model_zoo.nanogpt.config import PRESETS, OptimizerConfig, TrainConfig
from model_zoo.nanogpt.train import on_its_way
from tests.conftest import TINY, assert_same_run, elastic_gpt, environment, events, metrics

ROOT = Path(__file__).parents[2]
STEPS = 300


def arguments(data: Path, run: Path, *more: str) -> list[str]:
    return [
        "debug_cpu",
        *TINY,
        f"--steps={STEPS}",
        "--checkpoint.interval=100",
        f"--data.dir={data}",
        f"--run-dir={run}",
        *more,
    ]


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    elastic_gpt("train", *arguments(data, run))
    return run


def interrupt(data: Path, run: Path, number: signal.Signals, at: int) -> tuple[int, str]:
    """Train until step `at` is written, then send a signal; returns exit code and output."""
    command = [sys.executable, "-m", "elastic_gpt.cli", "train", *arguments(data, run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    deadline = time.monotonic() + 60
    while len(metrics(run)) < at:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    return process.returncode, output


def test_the_run_directory_holds_what_the_contract_says(undisturbed: Path) -> None:
    assert {path.name for path in undisturbed.iterdir()} == {
        "checkpoints", "config.yaml", "ledger.jsonl", "metrics.jsonl", "tokenizer",
    }  # fmt: skip
    line = metrics(undisturbed)[-1]
    assert set(line) == {
        "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "world_size", "sequence_hash",
    }  # fmt: skip
    assert (line["step"], line["tokens"], line["world_size"]) == (STEPS, STEPS * 8 * 32, 1)
    assert yaml.safe_load((undisturbed / "config.yaml").read_text())["model"]["vocab_size"] > 90
    assert [event["step"] for event in events(undisturbed, "saved")] == [100, 200, 300]
    assert line["loss"] < metrics(undisturbed)[0]["loss"] - 1


def test_kill_9_resumes_from_the_snapshot_and_the_run_is_the_same(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    assert interrupt(data, tmp_path / "run", signal.SIGKILL, at=155)[0] == -signal.SIGKILL
    reached = len(metrics(tmp_path / "run"))
    elastic_gpt("train", *arguments(data, tmp_path / "run"))
    assert_same_run(tmp_path / "run", undisturbed)
    restored = events(tmp_path / "run", "restored")[1]
    assert restored["source"].startswith("snapshot")
    assert reached - 10 <= restored["step"] <= reached + 1  # at most the steps since the last snapshot


def test_without_its_snapshot_it_resumes_from_the_checkpoint(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    interrupt(data, tmp_path / "run", signal.SIGKILL, at=155)
    (created,) = events(tmp_path / "run", "created")
    shutil.rmtree(shared_memory() / created["run_id"])
    elastic_gpt("train", *arguments(data, tmp_path / "run"))
    assert_same_run(tmp_path / "run", undisturbed)
    assert events(tmp_path / "run", "restored")[1]["source"] == "checkpoint step_00000100"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_asked_stop_loses_no_step(data: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals) -> None:
    code, output = interrupt(data, tmp_path / "run", number, at=155)
    assert code == 128 + number
    assert "saved in" in output
    stopped_at = len(metrics(tmp_path / "run"))
    (created,) = events(tmp_path / "run", "created")
    assert not (shared_memory() / created["run_id"]).exists()  # it is on storage, so no memory is held
    elastic_gpt("train", *arguments(data, tmp_path / "run"))
    assert_same_run(tmp_path / "run", undisturbed)
    restored = events(tmp_path / "run", "restored")[1]
    assert (restored["step"], restored["dropped"]) == (stopped_at, 0)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small volume")
def test_a_volume_that_is_full_for_a_while_costs_nothing(data: Path, tmp_path: Path) -> None:
    volume, run, flags = tmp_path / "volume", tmp_path / "volume" / "run", ["--steps=1500", "--checkpoint.interval=100"]
    volume.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", volume], check=False).returncode:
        pytest.skip("no volume can be mounted here")
    try:
        command = [sys.executable, "-m", "elastic_gpt.cli", "train", *arguments(data, run, *flags)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
        )
        while len(metrics(run)) < 150:
            assert process.poll() is None
        with (volume / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while ballast.write(bytes(4096)) == 4096:
                pass
        full_at = len(metrics(run))
        time.sleep(2.0)  # hundreds of steps
        assert process.poll() is None
        assert len(metrics(run)) < full_at + 50
        (volume / "ballast").unlink()
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
        assert "training goes on, make room" in output
        elastic_gpt("train", *arguments(data, tmp_path / "undisturbed", *flags))
        assert_same_run(run, tmp_path / "undisturbed")
    finally:
        subprocess.run(["umount", volume], check=True)


def test_torchrun_with_two_workers_is_the_same_run(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(ROOT / "model_zoo/nanogpt/train.py"), *arguments(data, tmp_path / "run")),
        ],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment(GLOO_SOCKET_IFNAME="lo"), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", undisturbed)
    assert metrics(tmp_path / "run")[-1]["world_size"] == 2
    assert events(tmp_path / "run", "evaluated")[-1]["loss"] == events(undisturbed, "evaluated")[-1]["loss"]


def test_a_finished_run_says_so_and_more_steps_go_on(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    assert "a larger --steps goes on" in elastic_gpt("train", *arguments(data, run)).stdout
    assert len(metrics(run)) == STEPS
    elastic_gpt("train", *arguments(data, run, "--steps=310"))
    assert [line["step"] for line in metrics(run)] == list(range(1, 311))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--seed=2", "has seed=1337, not 2"),
        ("--model.n-layer=2", "has model.n_layer=1, not 2"),
        ("--elastic.exact=false", "has elastic.exact=True, not False"),
    ],
)
def test_what_would_make_it_another_run_is_refused(data: Path, undisturbed: Path, flag: str, message: str) -> None:
    done = elastic_gpt("train", *arguments(data, undisturbed, flag), code=2)
    assert message in done.stderr
    assert "another --run-dir" in done.stderr


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_text_comes_out_with_the_run_directory_alone(tmp_path: Path, tokenizer: str) -> None:
    elastic_gpt("prepare", "--sample", f"--tokenizer={tokenizer}", "--output-dir", tmp_path / "data")
    elastic_gpt("train", *arguments(tmp_path / "data", tmp_path / "run", "--steps=20"))
    shutil.rmtree(tmp_path / "data")
    words = ["generate", tmp_path / "run", "--prompt=The ", "--max-new-tokens=20", "--seed=1"]
    text = elastic_gpt(*words).stdout
    assert len(text.strip()) >= 10
    assert elastic_gpt(*words).stdout == text


def test_other_data_under_the_same_run_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    elastic_gpt("prepare", "--sample", "--tokenizer=byte", "--output-dir", tmp_path)
    done = elastic_gpt("train", *arguments(tmp_path, undisturbed), code=2)
    assert "another --run-dir" in done.stderr


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    os.truncate(run / "checkpoints/step_00000300/model.safetensors", 100)
    done = elastic_gpt("train", *arguments(data, run))
    assert "step_00000300 is damaged" in done.stderr
    assert events(run, "restored")[-1]["step"] == 200
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.dir=nowhere"], "nowhere"),
        (["--model.block-size=100000"], "too short for one sequence"),
        (["--model.vocab-size=5"], "less than the data's"),
        (["--device=cuda"], "--device cpu"),
        (["--run-dir=/dev/null/run"], "choose another --run-dir"),
        (["--model.n-head=3"], "n_embd"),
    ],
)
def test_a_users_mistake_is_one_line(data: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    if flags == ["--device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = elastic_gpt("train", *arguments(data, tmp_path / "run", *flags), code=2)
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_bfloat16_and_float16_train_too(data: Path, tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float16"):
        run = tmp_path / dtype
        elastic_gpt("train", *arguments(data, run, "--steps=30", "--elastic.exact=false", f"--dtype={dtype}"))
        losses = [line["loss"] for line in metrics(run)]
        assert losses[-1] < losses[0] - 0.3


def test_what_is_being_saved_when_a_peer_is_lost_is_saved_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"model.w": torch.ones(3), "optimizer.step.w": torch.tensor(1.0)}
    snapshots = Snapshots(tmp_path / "shm", "node", "run", tensors)
    checksum = zlib.crc32

    def slow(*content: Any) -> int:
        time.sleep(0.5)
        return checksum(*content)

    monkeypatch.setattr(zlib, "crc32", slow)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(PeerLost), on_its_way(snapshots, checkpoints):  # noqa: PT012 - the loss comes after the saves
        snapshots.save(10, 0, tensors, [])
        checkpoints.save(10, tensors, [])
        raise PeerLost("in the next step")
    assert len(list((tmp_path / "shm" / "node").glob("*.json"))) == 1  # already there: the process ends now
    assert (tmp_path / "checkpoints" / "step_00000010" / "MANIFEST.json").exists()


def test_the_learning_rate_warms_up_and_decays() -> None:
    optimizer = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10)
    rates = [optimizer.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.55)
    assert optimizer.rate(100, 100) == pytest.approx(0.1)
    assert optimizer.rate(5000, 100) == pytest.approx(0.1)


def test_the_presets_have_the_sizes_they_are_named_for() -> None:
    from model_zoo.nanogpt.model import GPT

    config = parse(TrainConfig, ["gpt2_124m", "--model.vocab-size=50257"], presets=PRESETS, prog="x", environment={})
    with torch.device("meta"):
        assert GPT(config.model).parameter_count() == 124_439_808
    assert config.tokens_per_step == 491_520
