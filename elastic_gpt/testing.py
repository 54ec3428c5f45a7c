"""Tests whether a training script is elastic, in a test of your own:

    from elastic_gpt.testing import assert_elastic

    def test_my_training_is_elastic(tmp_path):
        assert_elastic("my_model.py", lambda run: [run, "--steps=12"], tmp_path)

The script runs once undisturbed, then with one, two and three workers, one of which is killed after
every step. The data that is used and the results have to be the same each time. Linux only: workers
are forked from a process that has imported torch.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from elastic_gpt.contract import CHECKPOINTS, WORLDS, shared_memory
from elastic_gpt.ledger import Ledger, read_metrics
from elastic_gpt.nodes import standby
from elastic_gpt.nodes.workers import Workers

PATIENCE = 240.0  # seconds for a step; only a failure takes that long
TOLERANCE = 0.05  # relative, of losses; float sums in another order differ a little


def assert_elastic(
    script: Path | str,
    arguments: Callable[[str], Sequence[str]],
    folder: Path,
    *,
    sizes: Sequence[int] = (1, 2, 3),
    exact: bool = True,
) -> None:
    """Assert that a training script that iterates over `Elastic` makes the same run whatever happens to its workers.

    Args:
        script: path of the script. Twelve steps are enough.
        arguments: gives the arguments of the script for a run directory.
        folder: an empty folder for the runs.
        sizes: numbers of workers to try.
        exact: whether parameters and losses have to be equal bit for bit.

    Raises:
        AssertionError: says what differs, and in which world.
    """
    name = f"elastic-gpt-testing-{os.getpid()}-{secrets.token_hex(8)}"
    standby.keep(name, ["elastic_gpt.script", "torch._dynamo"])
    undisturbed = folder / "undisturbed"
    _Job(name, script, arguments, undisturbed, workers=1).train()
    for size in sizes:
        run = folder / f"on-{size}"
        job = _Job(name, script, arguments, run, workers=size)
        job.train(kill=True)
        _compare(run, undisturbed, f"on {size} workers, one killed after each step", exact)
        dropped = [event["dropped"] for event in Ledger(run).events() if event["event"] == "restored"]
        assert job.kills > 0, f"on {size} workers: the run ended before anybody was killed: take more steps"
        assert size == 1 or not any(dropped), f"on {size} workers: steps were lost though workers lived: {dropped}"


def _compare(run: Path, undisturbed: Path, where: str, exact: bool) -> None:
    mine, expected = read_metrics(run), read_metrics(undisturbed)
    steps = [line["step"] for line in mine]
    assert steps == list(range(1, len(expected) + 1)), f"{where}: not each step once: {steps}"
    for one, other in zip(mine, expected, strict=True):
        at = f"{where}: step {one['step']}"
        assert one["sequence_hash"] == other["sequence_hash"], f"{at} was not of the same data"
        near = exact or abs(one["loss"] - other["loss"]) <= TOLERANCE * abs(other["loss"])
        assert one["loss"] == other["loss"] if exact else near, f"{at}: loss {one['loss']}, undisturbed {other['loss']}"
    newest = [sorted((one / CHECKPOINTS).glob("*/model.safetensors"))[-1].read_bytes() for one in (run, undisturbed)]
    assert not exact or newest[0] == newest[1], f"{where}: the parameters are not the same bit for bit"


class _Job:
    """Runs the workers of one script, in the role of their master and agents."""

    def __init__(
        self, name: str, script: Path | str, arguments: Callable[[str], Sequence[str]], run: Path, workers: int
    ) -> None:
        self.run, self.name, self.kills = run, name, 0
        self.command = ["run", str(script), *map(str, arguments(str(run)))]
        self.id = secrets.token_hex(4)
        self.log = run.with_suffix(".log")
        self.agents = [Workers(f"{name}-{self.id}-{node}") for node in range(workers)]
        self.workers: list[subprocess.Popen[Any]] = []

    def train(self, *, kill: bool = False) -> None:
        """Train to the end. With `kill`, one worker is killed after every step, each in turn."""
        try:
            self.workers = [self._start(node) for node in range(len(self.agents))]
            done, lives, deadline = 0, 0, time.monotonic() + PATIENCE
            while any(worker.poll() != 0 for worker in self.workers):
                time.sleep(0.005)
                assert time.monotonic() < deadline, f"no step in {PATIENCE:.0f} s: see {self.log}"
                for node, worker in enumerate(self.workers):
                    code = worker.poll()
                    assert code in (None, 0, 3, 4, -9), f"a worker ended with {code}: see {self.log}"
                    if code:
                        self.workers[node] = self._start(node)
                self._form_world()
                if len(lines := read_metrics(self.run)) > done:
                    done, deadline = len(lines), time.monotonic() + PATIENCE
                    # Only one kill in each life, after a step of its own: a life begins with the lines that the one before
                    # left to it, and its state has to be restored first.
                    restored = [event for event in Ledger(self.run).events() if event["event"] == "restored"]
                    if kill and len(restored) > lives and lines[-1]["step"] > restored[-1]["step"]:
                        lives = len(restored)
                        self.workers[self.kills % len(self.workers)].kill()
                        self.kills += 1
        finally:
            for worker in self.workers:
                worker.kill()
                worker.wait()
            shutil.rmtree(shared_memory() / Ledger(self.run).run_id(), ignore_errors=True)

    def _start(self, node: int) -> "subprocess.Popen[Any]":
        self.agents[node].forget()
        environment = {
            WORLDS: f"{self.name}-{self.id}-{node}",
            "ELASTIC_GPT_AGENT": str(os.getpid()),
            "TORCHELASTIC_RUN_ID": self.id,
            "POD_NAME": f"{self.id}-node-{node}",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", standby.__file__, self.name, *self.command],
                env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def _form_world(self) -> None:
        """Form a world of all workers, as soon as all wait for one."""
        there = [bool(agent.waiting()) for agent in self.agents]
        if not any(there):
            return
        for agent in self.agents:
            agent.call()
        if all(there):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            for rank, agent in enumerate(self.agents):
                world = {"RANK": rank, "WORLD_SIZE": len(self.agents), "MASTER_PORT": port}
                agent.give({0: {name: str(value) for name, value in world.items()}})
