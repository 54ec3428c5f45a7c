"""Helpers and fixtures of several test files: prepared data, the command line, and comparing runs."""

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import hypothesis
import pytest

from elastic_gpt.cli import COMMANDS
from elastic_gpt.contract import EVENTS, LEDGER
from elastic_gpt.nodes.standby import SIGNALS
from elastic_gpt.nodes.standby import __file__ as standby_file
from prepare.tokenizer import BytePairs, Learning

# If a shell runs the tests in the background, or nohup does, these are ignored here and in all processes that we start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples each time, so that only a change makes tests fail. --hypothesis-profile=default tries new ones.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")

TEST_DATA = Path(os.environ.get("TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
"""Test data that are not part of the project (CONTRIBUTING.md). What needs them is skipped without them."""

TINY = [
    *("--global-batch=8", "--micro-batch=2", "--model.block-size=32", "--model.n-layer=1", "--model.n-embd=32"),
    *("--device=cpu", "--elastic.exact", "--model.dropout=0.1", "--observe.tensorboard=false"),
]

WARM = ("train", "run", "replay", "evaluate", "export", "serve", "generate")  # commands that import torch


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Restores the signal handlers after each test: training in this process changes them."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample corpus, with one token for each character."""
    folder = tmp_path_factory.mktemp("data")
    elastic_gpt("prepare", "--sample", "--tokenizer", "char", "--output-dir", folder)
    return folder


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A full file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
            while ballast.write(bytes(4096)):
                pass
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an S3 server with a bucket named `bucket`. The environment variables of S3 clients point to it."""
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


def python_with(folder: Path, package: str) -> Path:
    """The Python of an environment of its own in `folder` that has `package`, whose pins and ours exclude each other."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile", package]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no {package} in an environment of its own: {done.stderr.strip().splitlines()[-1]}")
    return folder / "bin" / "python"


def trained_bpe(chunks: list[str], vocab_size: int) -> BytePairs:
    """A BPE of at most `vocab_size` ids learned from all of `chunks`."""
    return BytePairs.learn(iter(chunks), Learning(size=sum(map(len, chunks)), vocab_size=vocab_size))


def errors(done: subprocess.CompletedProcess[str]) -> str:
    """The lines on standard error that are not notes."""
    return "".join(line for line in done.stderr.splitlines(keepends=True) if not line.startswith("note: "))


PATIENCE = 240.0
"""Longest wait of a test, in seconds. So long that tests pass on a busy machine; only failures take this time."""


def until(condition: Callable[[], object], otherwise: str = "waited in vain") -> None:
    """Wait for `condition`."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


def environment(**more: str) -> dict[str, str]:
    """Environment with one CPU thread, as in local nodes: equality bit for bit needs the same number of threads."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | more


@functools.cache
def standby(_tests: int) -> str:
    """Name of the tests' standby process, with which commands need not import torch."""
    name = f"elastic-gpt-tests-{os.getpid()}-{secrets.token_hex(8)}"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0{name}")
    listener.listen()
    modules = ["tests.warm", *(COMMANDS[command][0] for command in WARM), "torch._dynamo"]
    code = f"from elastic_gpt.nodes.standby import serve; serve({listener.fileno()}, {modules}, {os.getpid()}, False)"
    subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1], pass_fds=[listener.fileno()])
    return name


def elastic_gpt(*words: object, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end and check its exit code."""
    if words[0] in WARM:
        command = [sys.executable, "-I", "-S", standby_file, standby(os.getpid())]
    else:
        command = [sys.executable, "-m", "elastic_gpt.cli"]
    done = subprocess.run(
        [*command, *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(**more),
        timeout=2 * PATIENCE,
        check=False,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def metrics(run: Path) -> list[dict]:
    """The whole lines of metrics.jsonl; the run may be writing another one."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def events(run: Path, kind: str) -> list[dict]:
    """The events of one kind in a run's ledger. Asserts that every line has the fields of the contract."""
    found = [json.loads(line) for line in (run / LEDGER).read_text().splitlines()]
    for event in found:
        for field, kinds in EVENTS[event["event"]].items():
            if field in event or field not in ("directory", "name", "stayed"):  # version 0.1.0 did not write these
                assert isinstance(event[field], (int, float) if kinds is float else kinds), (event, field)
    return [event for event in found if event["event"] == kind]


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """Assert that two runs have each step once, with the same sequences, losses and parameters, bit for bit."""
    kept, expected = metrics(run), metrics(undisturbed)
    assert [line["step"] for line in kept] == list(range(1, len(expected) + 1))
    for mine, theirs in zip(kept, expected, strict=True):
        assert (mine["sequence_hash"], mine["loss"]) == (theirs["sequence_hash"], theirs["loss"]), (
            f"step {mine['step']}"
        )
    newest = [sorted(path.glob("checkpoints/*/model.safetensors"))[-1].read_bytes() for path in (run, undisturbed)]
    assert newest[0] == newest[1]
