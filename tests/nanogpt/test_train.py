"""train.py: alone and under torchrun, interrupted and resumed, it is always the same run."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from elastic_gpt import gradients as sums
from elastic_gpt import rundir as folders_of_runs
from elastic_gpt import worlds as loop
from elastic_gpt.checkpoint import Checkpoints
from elastic_gpt.contract import CLAIM, shared_memory
from elastic_gpt.gradients import Gradients, StepSums
from elastic_gpt.identity import Run
from elastic_gpt.ledger import Ledger
from elastic_gpt.rundir import Introduction
from elastic_gpt.settings import SettingsError, parse
from elastic_gpt.snapshot import Snapshots
from elastic_gpt.storage import Unreachable
from elastic_gpt.world import PeerLost, World, join, leave
from elastic_gpt.worlds import _on_its_way
from model_zoo.nanogpt import rundir, train
from model_zoo.nanogpt.config import PRESETS, TrainConfig
from model_zoo.nanogpt.startup import loss_function
from prepare.data import read_meta
from tests.conftest import PATIENCE, TINY, assert_same_run, elastic_gpt, environment, errors, events, metrics, until
from tests.elastic.worlds import run_world

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


def interrupt(data: Path, run: Path, number: signal.Signals, at: int, *flags: str) -> tuple[int, str]:
    """Train until step `at` is written, then send a signal; returns exit code and output."""
    command = [sys.executable, "-m", "elastic_gpt.cli", "train", *arguments(data, run, *flags)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    while len(metrics(run)) < at:
        assert process.poll() is None, process.communicate()[0]
    process.send_signal(number)
    output = process.communicate(timeout=PATIENCE)[0]
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
    assert reached - 20 <= restored["step"] <= reached + 1  # the newest snapshot may have been on its way


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


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small volume")
def test_a_volume_that_is_full_for_a_while_costs_nothing(data: Path, tmp_path: Path) -> None:
    volume, run, flags = tmp_path / "volume", tmp_path / "volume" / "run", ["--steps=700", "--checkpoint.interval=100"]
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
        lines: list[str] = []

        def read() -> None:
            for line in process.stdout or []:
                lines.append(line)

        reader = threading.Thread(target=read)
        reader.start()

        def told() -> bool:
            with (volume / "ballast").open("ab", buffering=0) as ballast, contextlib.suppress(OSError):
                while ballast.write(bytes(4096)) == 4096:  # again and again: a checkpoint that failed makes room
                    pass
            return any("training goes on, make room" in line for line in lines)

        until(told)
        time.sleep(2.0)  # hundreds of steps
        assert process.poll() is None
        (volume / "ballast").unlink()
        assert process.wait(PATIENCE) == 0, lines
        reader.join()
        elastic_gpt("train", *arguments(data, tmp_path / "undisturbed", *flags))
        assert_same_run(run, tmp_path / "undisturbed")
    finally:
        subprocess.run(["umount", volume], check=True)


@pytest.mark.slow
def test_torchrun_with_two_workers_is_the_same_run(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(ROOT / "model_zoo/nanogpt/train.py"), *arguments(data, tmp_path / "run")),
        ],
        capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path, env=environment(GLOO_SOCKET_IFNAME="lo"), check=False,
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


def test_checkpoints_that_are_not_where_they_were_saved_are_missed_and_nothing_is_lost(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    before = (run / "metrics.jsonl").read_bytes()
    done = elastic_gpt("train", *arguments(data, run, f"--checkpoint.dir={tmp_path / 'unmounted'}"), code=2)
    assert errors(done).startswith(f"error: step {STEPS} of this run was saved in {undisturbed / 'checkpoints'}, but")
    assert errors(done).count("\n") == 1
    assert (run / "metrics.jsonl").read_bytes() == before
    elastic_gpt("train", *arguments(data, run, f"--steps={STEPS + 1}"))  # set back, it goes on
    assert len(metrics(run)) == STEPS + 1


def test_another_runs_checkpoints_are_left_alone(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    shutil.copytree(undisturbed / "checkpoints", place)
    flags = ["--seed=2", "--steps=400", "--checkpoint.keep=1", f"--checkpoint.dir={place}"]
    done = elastic_gpt("train", *arguments(data, tmp_path / "run", *flags), code=2)
    assert "holds checkpoints of another run" in done.stderr
    assert errors(done).count("\n") == 1
    assert sorted(path.name for path in place.iterdir()) == [f"step_{step:08d}" for step in (100, 200, 300)]


def test_settings_that_change_are_written_down(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    elastic_gpt("train", *arguments(data, run, f"--steps={STEPS + 1}", "--optimizer.clip=0.5"))
    (changed,) = events(run, "settings_changed")
    assert changed["changes"] == {"steps": [STEPS, STEPS + 1], "optimizer.clip": [1.0, 0.5]}


@pytest.mark.parametrize("text", ["", "model: {", "model"])
def test_a_torn_config_is_one_line(data: Path, undisturbed: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(undisturbed, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "run" / "config.yaml").write_text(text)
    config = parse(TrainConfig, arguments(data, tmp_path / "run"), presets=PRESETS, prog="x", environment={})
    with pytest.raises(SettingsError, match=r"config\.yaml is damaged: restore it"):
        rundir.open_run(config, read_meta(data), ALONE, Introduction())


@pytest.mark.parametrize(("lives", "agent", "code"), [(0, True, 1), (1, True, 3), (1, False, 1)])
def test_an_outage_is_waited_for_and_a_store_that_never_answered_is_a_crash(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: int, agent: bool, code: int
) -> None:
    if agent:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for _ in range(lives):
        Ledger(tmp_path).begin_life(["node"], 1, 0, "start", 0)

    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    def away(*_: object) -> None:
        raise Unreachable("cannot list s3://bucket/run: no route")

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(train, "train", away)
    with pytest.raises(Ended, match=str(code)):
        train.main(arguments(data, tmp_path))


@pytest.mark.parametrize(("agent", "code"), [(True, 3), (False, 1)])
def test_another_world_in_the_run_directory_ends_this_one_with_a_code_that_somebody_knows(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    agent: bool,
    code: int,
) -> None:
    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    def superseded(*_: object) -> None:
        raise PeerLost("another world trains here")

    if agent:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(train, "train", superseded)
    with pytest.raises(Ended, match=str(code)):
        train.main(arguments(data, tmp_path))
    assert ("its agent" in capsys.readouterr().err) == agent


ALONE = World(0, 1, 0, "node", torch.device("cpu"), False)


def opens(world: World, data: Path, folders: list[Path]) -> str:
    folders_of_runs.LOOKS, folders_of_runs.LOOK_SECONDS = 4, 0.05
    flags = arguments(data, folders[world.rank])
    config = parse(TrainConfig, flags, presets=PRESETS, prog="x", environment={})
    world = dataclasses.replace(world, local_rank=0, node=f"node-{world.rank}")
    try:
        return rundir.open_run(config, read_meta(data), world, Introduction()).run.run_id
    except SettingsError as error:
        return str(error)


def test_a_run_directory_that_the_nodes_do_not_share_is_noticed_by_all(data: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(tmp_path / "a")  # the same volume, mounted elsewhere
    assert len(set(run_world(2, opens, data, [tmp_path / "a", elsewhere]))) == 1
    told = run_world(2, opens, data, [tmp_path / "b", tmp_path / "c"])
    assert all("is not shared: node node-1 does not see in it" in text for text in told), told
    Ledger(tmp_path / "a").run_id()
    told = run_world(2, opens, data, [tmp_path / "b", tmp_path / "a"])  # another run's
    assert all("is not shared: node node-1" in text for text in told), told
    assert not (tmp_path / "b" / CLAIM).exists()  # nobody waits for the job that has ended


def test_a_failed_checkpoint_is_told_once_and_made_up_for_at_the_next_snapshot(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").touch()  # a file where the folder belongs
    flags = ["--steps=100000", "--checkpoint.interval=503", "--evaluate.interval=0"]
    command = [sys.executable, "-m", "elastic_gpt.cli", "train", *arguments(data, run, *flags)]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert worker.stdout
        assert any("could not be written" in line for line in worker.stdout)
        time.sleep(0.2)  # it is tried again
        (run / "checkpoints").unlink()
        until(lambda: events(run, "saved"))
    finally:
        worker.kill()
    worker.wait()
    saved = events(run, "saved")[0]
    assert (saved["step"] % 503 != 0, saved["place"]) == (True, str(run / "checkpoints"))  # not the next that was due
    assert len(events(run, "save_failed")) == 1


@pytest.mark.slow
def test_a_stop_does_not_wait_for_an_evaluation_and_the_next_life_does_it(data: Path, tmp_path: Path) -> None:
    run, flags = tmp_path / "run", ["--steps=100", "--evaluate.interval=1", "--evaluate.sequences=8"]
    interrupt(data, run, signal.SIGTERM, 50, *flags)
    (stopped,) = events(run, "stopped")
    assert events(run, "evaluated")[-1]["step"] == stopped["step"] - 1
    elastic_gpt("train", *arguments(data, run, *flags))
    assert [event["step"] for event in events(run, "evaluated")] == list(range(1, 101))


SLOW = """
import os, signal, sys, time
from elastic_gpt.checkpoint import Checkpoints
from elastic_gpt.gradients import Gradients
from elastic_gpt.observers import ConsoleObserver
from model_zoo.nanogpt import train
from elastic_gpt.world import Signals
reduce, asked = Gradients.reduce, []

def slow_reduce(self, *stops):
    if not asked:
        asked.append(True)
        os.kill(os.getpid(), signal.SIGTERM)
        Signals.waited = 1e6  # a step of 11 days
        stops = (True, True)
    return reduce(self, *stops)

def say(self, text):
    if "NOT saved" in text:
        os._exit(77)

Gradients.reduce, Checkpoints._write = slow_reduce, lambda *_: time.sleep(1e6)
ConsoleObserver.on_message = say
train.main(sys.argv[1:])
"""


def test_the_step_in_flight_is_part_of_the_grace_time(data: Path, tmp_path: Path) -> None:
    words = arguments(data, tmp_path / "run", "--elastic.grace-seconds=1000000")
    done = subprocess.run([sys.executable, "-c", SLOW, *words], timeout=PATIENCE, env=environment(), check=False)
    assert done.returncode == 77  # it waits for storage no longer


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
    assert errors(done).startswith("error: ")
    assert errors(done).count("\n") == 1


@pytest.mark.parametrize("agent", [False, True])
def test_an_error_that_nobody_foresaw_is_one_line_and_its_traceback_is_in_a_nodes_log_alone(
    agent: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> int:
        return 1 // 0

    ended: list[int] = []
    monkeypatch.setattr(train, "train", broken)
    monkeypatch.setattr(os, "_exit", ended.append)
    if agent:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    train.main(arguments(data, tmp_path / "run"))
    said = capsys.readouterr().err
    assert ended == [1]
    assert said.splitlines()[-1].startswith("error: ZeroDivisionError at ")
    assert ("Traceback" in said) == agent


def test_bfloat16_and_float16_train_too(data: Path, tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float16"):
        run = tmp_path / dtype
        elastic_gpt("train", *arguments(data, run, "--steps=30", "--elastic.exact=false", f"--dtype={dtype}"))
        losses = [line["loss"] for line in metrics(run)]
        assert losses[-1] < losses[0] - 0.3


def test_a_snapshot_that_is_being_made_when_a_peer_is_lost_is_made_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"model.w": torch.ones(3), "optimizer.step.w": torch.tensor(1.0)}
    snapshots = Snapshots(tmp_path / "shm", "node", "run", tensors)
    checksum = zlib.crc32

    def slow(*content: Any) -> int:
        time.sleep(0.5)
        return checksum(*content)

    monkeypatch.setattr(zlib, "crc32", slow)
    with pytest.raises(PeerLost), _on_its_way(snapshots):  # noqa: PT012 - the loss comes after the save
        snapshots.save(10, 0, tensors, [])
        raise PeerLost("in the next step")
    assert len(list((tmp_path / "shm" / "node").glob("*.json"))) == 1  # already there: the process ends now


def bad_loss(at: set[int]) -> Any:
    """`loss_function`, but in the steps `at` one micro-batch has a loss of NaN."""
    calls = itertools.count()

    def make(*words: Any) -> Any:
        loss_sum = loss_function(*words)

        def loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            step, micro_batch = divmod(next(calls), 4)
            return loss_sum(tokens, targets) * (math.nan if step + 1 in at and micro_batch == 2 else 1.0)

        return loss

    return make


def strict(path: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.fixture
def _saves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the disk is, no checkpoint is left out because the one before is still being written."""
    save = Checkpoints.save

    def at_once(checkpoints: Checkpoints, *args: Any, **more: Any) -> None:
        save(checkpoints, *args, **more)
        assert checkpoints.pending
        concurrent.futures.wait([checkpoints.pending])

    monkeypatch.setattr(Checkpoints, "save", at_once)


@pytest.mark.usefixtures("_saves_at_once")
@pytest.mark.parametrize(
    "flags", [[], *(["--elastic.exact=false", f"--dtype={name}"] for name in ("float32", "bfloat16", "float16"))]
)
def test_an_update_that_is_not_finite_is_skipped_and_the_run_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.setattr(train, "loss_function", bad_loss({5, 6, 9}))
    run = tmp_path / "run"
    flags = ["--steps=20", "--checkpoint.interval=5", "--checkpoint.keep=9", "--observe.tensorboard=true", *flags]
    assert train.main(arguments(data, run, *flags)) == 0
    lines = strict(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 21))
    skipped = {line["step"] for line in lines if line.get("skipped")}
    assert skipped == {5, 6, 9}
    assert all((line["loss"] is None) == (line["step"] in skipped) for line in lines)
    assert [event["step"] for event in strict(run / "ledger.jsonl") if event["event"] == "skipped"] == [5, 6, 9]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        f"step_{step:08d}" for step in (10, 15, 20)
    ]
    newest = load_file(run / "checkpoints/step_00000020/optimizer.safetensors")
    assert newest["step.wte.weight"] == 17  # of 20, three were left out


def ended(words: list[str]) -> int | str | None:
    """The exit code of a training in this process."""
    try:
        return train.main(words)
    except SystemExit as end:
        return end.code


@pytest.mark.usefixtures("_saves_at_once")
def test_too_many_in_a_row_stop_the_run_and_a_smaller_rate_goes_on_from_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, flags = tmp_path / "run", ["--steps=40", "--checkpoint.interval=5", "--optimizer.max-skipped=4"]
    monkeypatch.setattr(train, "loss_function", bad_loss(set(range(13, 40))))
    assert ended(arguments(data, run, *flags)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert line == (
        "error: loss or gradient not finite in 4 updates in a row, up to step 16 (optimizer.max_skipped): the last good"
        " checkpoint is step_00000010; the same command with a smaller --optimizer.learning-rate goes on"
    )
    assert events(run, "diverged")[0]["good"] == 12
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000005", "step_00000010"]
    monkeypatch.setattr(train, "loss_function", loss_function)
    assert ended(arguments(data, run, *flags, "--optimizer.learning-rate=1e-4")) == 0
    assert events(run, "restored")[-1]["step"] == 10
    assert [one["step"] for one in strict(run / "metrics.jsonl") if "skipped" not in one] == list(range(1, 41))


@pytest.mark.parametrize(("interval", "rate"), [(1, 1e300), (50, 1e38)])
def test_a_rate_that_blows_the_parameters_up_leaves_the_good_checkpoints(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], interval: int, rate: float
) -> None:
    run, flags = (
        tmp_path / "run",
        [f"--elastic.snapshot-interval={interval}", "--checkpoint.interval=10", "--checkpoint.keep=2"],
    )
    assert ended(arguments(data, run, *flags, "--steps=20")) == 0
    capsys.readouterr()
    rates = [f"--optimizer.learning-rate={rate}", f"--optimizer.min-learning-rate={rate}", "--optimizer.clip=0"]
    assert ended(arguments(data, run, *flags, *rates)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert (
        "the last good checkpoint is step_00000020; the same command with a smaller --optimizer.learning-rate" in line
    )
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000010", "step_00000020"]
    strict(run / "metrics.jsonl")
    strict(run / "ledger.jsonl")
    assert ended(arguments(data, run, *flags, "--steps=30")) == 0
    assert events(run, "restored")[-1]["step"] <= 21


def test_a_broken_checkpoint_of_an_older_version_is_named_by_training_and_by_generating(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    checkpoints = Checkpoints(run / "checkpoints", keep=9, run=Run(Ledger(run).run_id(), 0, []))
    tensors = checkpoints.read(300, "model") | checkpoints.read(300, "optimizer")
    tensors["model.wte.weight"][3, 3] = math.nan
    checkpoints.save(310, tensors, [])
    checkpoints.finished(wait=True)
    for words in (["train", *arguments(data, run, "--steps=320")], ["generate", run, "--prompt=a", "--temperature=0"]):
        done = subprocess.run(
            [sys.executable, "-m", "elastic_gpt.cli", *map(str, words)],
            capture_output=True, text=True, env=environment(), timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert done.returncode in (1, 2)
        (line,) = errors(done).splitlines()
        assert "wte.weight" in line
        assert "not finite" in line


def in_two_worlds(world: World, arguments: list[str], pieces: int) -> list[int]:
    """Train in a world of two, then, as one whose peer has gone, alone; the number of compiled graphs before and in each step.

    The peer dies in the sum of the fifth step, after `pieces` of the gradient.
    """
    import torch._dynamo

    sums.PIECE = 1000
    config, meta = train.check(arguments)
    config = dataclasses.replace(config, compile=True, dtype="float32")
    compiler = torch.compile
    torch.compile = functools.partial(compiler, backend="aot_eager")  # traces as the real one does, without its minute
    training = train.Training(config, meta)

    def steps(world: World) -> None:
        for step in training.in_world(world):
            for tokens, targets in step:
                step.backward(training.loss_sum(tokens, targets))
            step.update(1e-3)

    places = [tensor.data_ptr() for tensor in training.tensors.values()]
    reduce, sum_piece, graphs, left = Gradients.reduce, Gradients._sum, [], [pieces]
    fresh = [tensor.clone() for tensor in training.tensors.values()]
    training.warm_up()
    graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert all(torch.equal(one, other) for one, other in zip(training.tensors.values(), fresh, strict=True))

    def counted(self: Gradients, stop: bool, leave: bool) -> StepSums:
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return reduce(self, stop, leave)

    def until_a_peer_dies(self: Gradients, piece: slice) -> None:
        if training.held.step == 4 and world.rank == 1:
            if not left[0]:
                os._exit(0)
            left[0] -= 1
        sum_piece(self, piece)

    before: list[torch.Tensor] = []
    update = loop.update

    def seen(optimizer: torch.optim.Optimizer, skip: torch.Tensor) -> None:
        update(optimizer, skip)
        before[:] = [tensor.clone() for tensor in training.tensors.values()]

    loop.update = seen
    Gradients.reduce, Gradients._sum = counted, until_a_peer_dies  # type: ignore[method-assign]
    with pytest.raises(PeerLost):
        steps(world)
    assert training.held.step == 4
    assert all(torch.equal(one, other) for one, other in zip(training.tensors.values(), before, strict=True))
    assert leave()
    assert training.keep()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    steps(join("cpu", 60.0))
    assert [tensor.data_ptr() for tensor in training.tensors.values()] == places
    return graphs


@pytest.mark.parametrize("pieces", [0, 3])
def test_a_survivor_keeps_its_tensors_and_its_compiled_graph_and_does_the_dropped_step_again(
    data: Path, tmp_path: Path, pieces: int
) -> None:
    flags = arguments(data, tmp_path / "run", "--steps=8", "--evaluate.interval=0")
    (graphs,) = run_world(2, in_two_worlds, flags, pieces, dies=[1])
    assert graphs == [1] + [1] * (8 + 1)  # the step that was dropped has been done again, and no other
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 9))
    assert [event["dropped"] for event in events(tmp_path / "run", "restored")] == [0, 0]
