"""examples/torchrun: our laws under plain torchrun, and what torchrun itself does not survive. Real agents, two local nodes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import PATIENCE, TINY, assert_same_run, elastic_gpt, environment, events, metrics, until

pytestmark = pytest.mark.slow

TRAIN = Path(__file__).parents[2] / "examples" / "torchrun" / "train.sh"
STEPS = 3000
ARGUMENTS = ["debug_cpu", *TINY, f"--steps={STEPS}", "--evaluate.interval=0", "--checkpoint.interval=200"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Nodes:
    """Local nodes, each started by examples/torchrun/train.sh as on a machine of its own."""

    def __init__(self, arguments: list[str], logs: Path) -> None:
        self.arguments, self.logs = arguments, logs
        self.port = free_port()
        self.started: list[subprocess.Popen[bytes]] = []

    def add(self, **variables: str) -> subprocess.Popen[bytes]:
        more = {
            "RENDEZVOUS": f"127.0.0.1:{self.port}",
            "NODES": "1:2",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **variables,
        }
        with (self.logs / f"node-{len(self.started)}.log").open("wb") as log:
            node = subprocess.Popen(
                ["sh", str(TRAIN), *self.arguments],
                env=environment(**more),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(node)
        return node

    def join(self, first: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        """Another node, for which the first one's worker waits: however fast it trains, it is not over before."""
        workers = psutil.Process(first.pid).children(recursive=True)
        for worker in workers:
            worker.suspend()
        node = self.add()
        until(lambda: self._at_the_store(node), "torchrun does not start")
        for worker in workers:
            worker.resume()
        return node

    def _at_the_store(self, node: subprocess.Popen[bytes]) -> bool:
        links = psutil.Process(node.pid).net_connections("tcp")
        return any(link.raddr and link.raddr.port == self.port for link in links)

    def said(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.logs.glob("node-*.log")))


def worlds(run: Path) -> list[int]:
    """How many workers each world had so far."""
    return [event["world_size"] for event in events(run, "joined")] if (run / "ledger.jsonl").exists() else []


@contextlib.contextmanager
def nodes_of(arguments: list[str], logs: Path) -> Iterator[Nodes]:
    nodes = Nodes(arguments, logs)
    try:
        yield nodes
    finally:
        for node in nodes.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    elastic_gpt("train", *ARGUMENTS, "--data.dir", data, "--run-dir", run)
    return run


def test_a_node_is_killed_another_joins_and_the_run_is_the_same(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with nodes_of([*ARGUMENTS, "--data.dir", str(data), "--run-dir", str(run)], tmp_path) as nodes:
        first = nodes.add()
        until(lambda: len(metrics(run)) >= 20, "the first node does not train")
        second = nodes.join(first)
        until(lambda: worlds(run)[-1:] == [2], "the second node does not join")
        reached = len(metrics(run))
        until(lambda: len(metrics(run)) >= reached + 20, "two nodes do not train")
        os.killpg(second.pid, signal.SIGKILL)
        assert first.wait(PATIENCE) == 0, nodes.said()
    assert worlds(run) == [1, 2, 1]
    assert_same_run(run, undisturbed)


def test_a_second_job_on_the_run_directory_is_refused(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*ARGUMENTS, "--data.dir", str(data), "--run-dir", str(run)]
    other = tmp_path / "other"
    other.mkdir()
    with nodes_of(arguments, tmp_path) as job, nodes_of(arguments, other) as second:
        first = job.add()
        until(lambda: len(metrics(run)) >= 20, "the first job does not train")
        worker = psutil.Process(first.pid).children(recursive=True)
        for one in worker:
            one.suspend()  # however fast it trains, it is not over before
        assert second.add(RESTARTS="0").wait(PATIENCE) != 0
        assert "is in use" in second.said()


def test_the_node_with_torchruns_store_ends_the_others_and_the_same_command_goes_on(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with nodes_of([*ARGUMENTS, "--data.dir", str(data), "--run-dir", str(run)], tmp_path) as nodes:
        first = nodes.add()
        until(lambda: len(metrics(run)) >= 20, "the first node does not train")  # so it is the one with the store
        second = nodes.join(first)
        until(lambda: worlds(run)[-1:] == [2], "the second node does not join")
        reached = len(metrics(run))
        until(lambda: len(metrics(run)) >= reached + 20, "two nodes do not train")
        os.killpg(first.pid, signal.SIGKILL)
        assert second.wait(PATIENCE) != 0
        assert nodes.add().wait(PATIENCE) == 0, nodes.said()
    assert worlds(run)[-1] == 1
    assert_same_run(run, undisturbed)
