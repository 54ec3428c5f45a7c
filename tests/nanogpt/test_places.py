"""places.py: training with data and run directory on an object store makes the undisturbed run, whatever is killed."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml

from elastic_gpt import Elastic
from elastic_gpt.contract import shared_memory
from elastic_gpt.ledger import read_metrics
from elastic_gpt.mirror import Mirror
from elastic_gpt.nodes.local import LocalJob
from model_zoo.nanogpt import places
from model_zoo.nanogpt.config import DataConfig, TrainConfig
from tests.conftest import TINY, assert_same_run, elastic_gpt, environment, events, until

STEPS = 120
FLAGS = (*TINY, f"--steps={STEPS}", "--checkpoint.interval=40", "--evaluate.interval=0", "--evaluate.sequences=8")
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    elastic_gpt("train", "debug_cpu", *FLAGS, "--data.dir", data, "--run-dir", run)
    return run


@pytest.fixture
def bucket(data: Path, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:  # noqa: ARG001
    """A place on a store, with prepared data in it; what is copied to this machine is this test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"s3://bucket/{uuid.uuid4().hex}"
    fsspec.filesystem("s3").put(f"{data}/", f"{url}/data/", recursive=True)
    yield url
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(memory(url))


def train(bucket: str, *more: str) -> list[str]:
    return ["train", "debug_cpu", *FLAGS, f"--data.dir={bucket}/data", f"--run-dir={bucket}/run", *more]


def steps(bucket: str) -> int:
    mirror = Mirror(f"{bucket}/run")
    mirror.reopen()
    return len(read_metrics(mirror.folder))


def fetched(bucket: str, folder: Path) -> Path:
    """What the store holds, as a run directory."""
    mirror = Mirror(f"{bucket}/run")
    mirror.reopen()
    shutil.copytree(mirror.folder, folder)
    fsspec.filesystem("s3").get(f"{bucket}/run/checkpoints", str(folder / "checkpoints"), recursive=True)
    return folder


def memory(bucket: str) -> Path:
    mirror = Mirror(f"{bucket}/run")
    mirror.reopen()
    return shared_memory() / events(mirror.folder, "created")[0]["run_id"]


def kill_at(step: int, bucket: str, **more: str) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-m", "elastic_gpt.cli", *train(bucket)], stdout=subprocess.DEVNULL, env=environment(**more)
    )
    until(lambda: steps(bucket) >= step or worker.poll() is not None)
    worker.send_signal(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["the worker", "the machine"])
def test_a_killed_run_goes_on_from_the_store_and_is_the_same(
    bucket: str, undisturbed: Path, tmp_path: Path, lost: str
) -> None:
    kill_at(50, bucket)
    if lost == "the machine":
        shutil.rmtree(memory(bucket))
        shutil.rmtree(tmp_path / "cache")
    done = elastic_gpt(*train(bucket))
    run = fetched(bucket, tmp_path / "run")
    assert_same_run(run, undisturbed)
    source = events(run, "restored")[1]["source"]
    assert source.startswith("snapshot" if lost == "the worker" else "checkpoint step_00000040")
    assert f"run: {bucket}/run, from step" in done.stdout
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["run_dir"], settings["data"]["dir"]) == (f"{bucket}/run", f"{bucket}/data")
    assert elastic_gpt("generate", f"{bucket}/run", "--prompt", "The ", "--max-new-tokens", "5").stdout
    assert "nats a token" in elastic_gpt("evaluate", f"{bucket}/run", "--sequences=8").stdout
    assert f"{STEPS} steps kept" in elastic_gpt("ledger", f"{bucket}/run").stdout


@contextlib.contextmanager
def flaky(app: Callable[..., Iterable[bytes]]) -> Iterator[str]:
    """The same store at another address, where requests are throttled now and then, or done and the answer is lost."""
    from werkzeug.serving import make_server

    count = itertools.count(1)

    def sometimes(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        number = next(count)
        if number % 7 == 0:
            start("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(SLOW_DOWN)))])
            return [SLOW_DOWN]
        if number % 11 == 0 and environ["REQUEST_METHOD"] == "PUT":
            list(app(environ, lambda *_: None))
            start("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        return app(environ, start)

    server = make_server("127.0.0.1", 0, sometimes, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_store_that_throttles_and_loses_answers_changes_nothing(
    bucket: str, undisturbed: Path, tmp_path: Path
) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    with flaky(DomainDispatcherApplication(create_backend_app)) as address:
        kill_at(50, bucket, AWS_ENDPOINT_URL_S3=address)
        elastic_gpt(*train(bucket), AWS_ENDPOINT_URL_S3=address)
    assert_same_run(fetched(bucket, tmp_path / "run"), undisturbed)


@pytest.mark.slow
def test_nodes_that_share_nothing_but_the_store_are_killed_and_the_run_is_the_same(
    bucket: str, undisturbed: Path, tmp_path: Path
) -> None:
    with LocalJob(train(bucket), least=1, most=3, say=lambda _: None) as job:
        for _ in range(3):
            job.add_node()
        until(lambda: steps(bucket) >= 20)
        job.kill(job.running()[0])
        until(lambda: steps(bucket) >= 50)
        job.add_node()
        until(lambda: not job.running())
        assert job.exit_code() == 0
    run = fetched(bucket, tmp_path / "run")
    assert_same_run(run, undisturbed)
    assert len(events(run, "joined")) >= 2


@pytest.mark.slow
def test_a_second_job_is_refused(bucket: str) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-m", "elastic_gpt.cli", *train(bucket, "--steps=100000")],
        stdout=subprocess.DEVNULL,
        env=environment(),
    )
    try:
        until(lambda: steps(bucket) >= 1 or worker.poll() is not None)
        said = elastic_gpt(*train(bucket), code=2).stderr
    finally:
        worker.kill()
        worker.wait()
    assert f"error: run directory {bucket}/run is in use" in said


def test_a_model_of_ones_own_runs_on_a_store_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    data = torch.utils.data.TensorDataset(torch.randn(32, 2), torch.randn(32))

    def trained(steps: int) -> int:
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = Elastic(url, model, optimizer, data, steps=steps, global_batch=8, micro_batch=4, device="cpu")
        did = 0
        for step in run:
            for inputs, targets in step:
                step.backward((model(inputs)[:, 0] - targets).square().sum())
            step.update()
            did += 1
        return did

    assert (trained(6), trained(10)) == (6, 4)
    assert f"run: {url}, from step 6 (checkpoint step_00000006)" in capsys.readouterr().out
    mirror = Mirror(url)
    mirror.reopen()
    assert [line["step"] for line in read_metrics(mirror.folder)] == list(range(1, 11))
    assert [event["step"] for event in events(mirror.folder, "finished")] == [6, 10]


def test_a_folder_stays_what_it_is_and_a_url_is_written_down_as_given(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = TrainConfig(run_dir=tmp_path, data=DataConfig(dir=data))
    assert places.here(plain) == plain == places.given(plain)
    url = f"memory://{uuid.uuid4().hex}"
    for path in data.rglob("*"):
        if path.is_file():
            fsspec.filesystem("memory").pipe_file(f"{url}/{path.relative_to(data).as_posix()}", path.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = TrainConfig(run_dir=Path("memory://run"), data=DataConfig(dir=Path(url)))
    here = places.here(config)
    assert here.data.dir.parent == tmp_path / "cache" / "elastic-gpt" / "data"
    assert os.access(here.run_dir, os.W_OK)
    given = places.given(here)
    assert (str(given.run_dir), str(given.data.dir)) == ("memory://run", url)
    assert places.here(config).run_dir == here.run_dir
