"""Joining, leaving, and what a worker hears of its agent."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from elastic_gpt.world import Signals, World
from tests.elastic.worlds import run_world

CHILD = """
import os, sys, time
from elastic_gpt.processes import die_with_parent
die_with_parent(int(sys.argv[1]))
print("up", flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def test_a_worker_dies_with_its_agent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while alive(child):
        assert time.monotonic() < deadline, "the worker outlived its agent"
        time.sleep(0.05)


def test_a_worker_whose_agent_died_before_it_could_say_so_ends_at_once() -> None:
    orphan = subprocess.run([sys.executable, "-c", CHILD, "1"], capture_output=True, timeout=20, check=False)
    assert orphan.returncode == -signal.SIGKILL


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def collectives(world: World) -> tuple[list[float], list[int], list[float]]:
    summed = torch.tensor([float(world.rank)])
    world.sum(summed)
    sent = torch.full((2,), float(world.rank))
    world.broadcast([sent], source=1)
    return summed.tolist(), world.gather(world.rank), sent.tolist()


def slow_work(world: World, fail: bool) -> str:
    def work() -> str:
        time.sleep(1.0)
        if fail:
            raise ValueError(f"of rank {world.rank}")
        return f"done by {world.rank}"

    try:
        return world.first_does(work)
    except ValueError as error:
        return str(error)


def test_the_work_of_one_rank_may_outlast_the_timeout_and_its_error_reaches_all() -> None:
    assert run_world(3, slow_work, False, timeout=0.5) == ["done by 0"] * 3
    assert run_world(3, slow_work, True, timeout=0.5) == ["of rank 0"] * 3


def test_sums_gathers_and_broadcasts_reach_every_rank() -> None:
    assert run_world(3, collectives) == [([3.0], [0, 1, 2], [1.0, 1.0])] * 3


@pytest.mark.parametrize(
    ("agent", "number", "leaves"),
    [
        (True, signal.SIGTERM, False),
        (True, signal.SIGUSR1, True),
        (False, signal.SIGTERM, True),
        (False, signal.SIGINT, True),
    ],
)
def test_an_agents_sigterm_is_a_stop_and_its_sigusr1_is_leaving_for_good(
    monkeypatch: pytest.MonkeyPatch, agent: bool, number: signal.Signals, leaves: bool
) -> None:
    monkeypatch.delenv("DLROVER_MASTER_ADDR", raising=False)
    if agent:
        monkeypatch.setenv("DLROVER_MASTER_ADDR", "127.0.0.1:1")
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        signals = Signals()
        assert not signals.stop
        os.kill(os.getpid(), number)
        assert (signals.stop, signals.leave) == (True, leaves)
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
