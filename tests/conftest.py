"""What several rooms' tests need: prepared data, the command line, and runs to compare."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import hypothesis
import pytest

# A shell that runs the tests in the background, or nohup, has these ignored, here and in all that we start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples each time, so that a change is blamed for what it did; --hypothesis-profile=default looks for new ones.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")

TINY = [
    *("--global-batch=8", "--micro-batch=2", "--model.block-size=32", "--model.n-layer=1", "--model.n-embd=32"),
    *("--device=cpu", "--elastic.exact", "--model.dropout=0.1", "--observe.tensorboard=false"),
]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample corpus, a token a character."""
    folder = tmp_path_factory.mktemp("data")
    elastic_gpt("prepare", "--sample", "--tokenizer", "char", "--output-dir", folder)
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an S3 server with a bucket named `bucket`; the environment points to it as a user's would."""
    pytest.importorskip("s3fs", reason="pip install s3fs")
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    running = moto.ThreadedMotoServer("127.0.0.1", 0)
    running.start()
    host, port = running.get_host_and_port()
    address = f"http://{host}:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (keys | {"AWS_ENDPOINT_URL_S3": address}).items():
            patch.setenv(name, value)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield address
    running.stop()


PATIENCE = 240.0
"""Seconds that a test waits for what has to come: it only bounds a failure, so that a busy machine fails none."""


def until(condition: Callable[[], object], otherwise: str = "waited in vain") -> None:
    """Wait for `condition`."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


def environment(**more: str) -> dict[str, str]:
    """One CPU thread, as nodes that share a machine have: bit for bit the same needs the same."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | more


def elastic_gpt(*words: object, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end and check its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "elastic_gpt.cli", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(**more),
        timeout=2 * PATIENCE,
        check=False,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl that are whole: the run may be writing."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def events(run: Path, kind: str) -> list[dict]:
    return [
        event
        for line in (run / "ledger.jsonl").read_text().splitlines()
        if (event := json.loads(line))["event"] == kind
    ]


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """The same sequences, losses and parameters, bit for bit; each step once."""
    kept, expected = metrics(run), metrics(undisturbed)
    assert [line["step"] for line in kept] == list(range(1, len(expected) + 1))
    for mine, theirs in zip(kept, expected, strict=True):
        assert (mine["sequence_hash"], mine["loss"]) == (theirs["sequence_hash"], theirs["loss"]), (
            f"step {mine['step']}"
        )
    newest = [sorted(path.glob("checkpoints/*/model.safetensors"))[-1].read_bytes() for path in (run, undisturbed)]
    assert newest[0] == newest[1]
