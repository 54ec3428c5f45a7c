"""The systems that the same events can happen to: ElasticGPT, plain torchrun, DLRover as it comes, and torchft.

Each is a job of numbered nodes on this machine, one worker with one CPU thread a node, and tells which steps it did. What the
other three train is model_zoo/nanogpt/baseline.py, with each one's own ways.
"""

import contextlib
import functools
import importlib
import itertools
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from elastic_gpt.contract import METRICS, shared_memory
from elastic_gpt.drill.measures import Done
from elastic_gpt.ledger import Ledger, read_metrics
from elastic_gpt.nodes.local import LocalJob
from elastic_gpt.order import Order, sequence_count, sequence_hash
from elastic_gpt.processes import die_with_parent
from prepare.data import open_split

BASELINE = "model_zoo.nanogpt.baseline"
MEMORY_INTERVAL, DISK_INTERVAL = 10, 50  # steps between two saves, in memory where a system has that, and on disk
LOOK_SECONDS = 0.01


class Ours(LocalJob):
    """ElasticGPT; what happened is in its ledger and metrics.

    Args:
        data: prepared text.
        out: a folder for what the job leaves behind.
        nodes: the most the job may have.
        flags: of `elastic-gpt train`, beside those that all systems share.
    """

    def __init__(self, data: Path, out: Path, nodes: int, flags: tuple[str, ...] = ()) -> None:
        self.run, self.data, self.history = out / "run", data, list[Done]()
        self.has_master = True
        self.order: Order | None = None
        """Which sequences a step uses, once the run has begun."""
        super().__init__(
            ["train", *self.training(data), *flags, "--run-dir", str(self.run), "--steps=1000000"],
            least=1, most=nodes, threads=1, say=lambda _: None,
        )  # fmt: skip
        self._over = threading.Event()

    @staticmethod
    def training(data: Path) -> list[str]:
        """What is trained: preset and flags."""
        return [
            *("debug_cpu", "--data.dir", str(data), "--device=cpu", "--observe.tensorboard=false"),
            *("--evaluate.interval=0", f"--checkpoint.interval={DISK_INTERVAL}"),
            "--optimizer.decay-steps=1000",  # not by the number of steps, which the undisturbed run has fewer of
            f"--elastic.snapshot-interval={MEMORY_INTERVAL}",
        ]

    def __enter__(self) -> "Ours":
        super().__enter__()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *details: object) -> None:
        self._over.set()
        super().__exit__(*details)
        if self.run.exists():
            shutil.rmtree(shared_memory() / Ledger(self.run).run_id(), ignore_errors=True)

    def begin(self, nodes: int) -> None:
        """Start so many nodes, after the end of all there are."""
        for node in self.running():
            self.kill(node)
        for _ in range(nodes):
            self.add_node()

    def done(self) -> list[Done]:
        """All steps so far, those that were lost and done again too, as they were seen."""
        return list(self.history)

    def together(self, since: float) -> bool:
        """Whether the nodes there are have done a step together, in a world that began after `since` (seconds since 1970)."""
        joined = [event for event in Ledger(self.run).events() if event["event"] == "joined"]
        if not joined or joined[-1]["time"] < since:
            return False
        names = {self.node_name(node) for node in self.running()}
        return set(joined[-1]["nodes"]) == names and any(one.time > joined[-1]["time"] for one in self.history[-5:])

    def position(self) -> tuple[int, int]:
        """The last step, and the workers that did it."""
        return (self.history[-1].step, self.history[-1].world) if self.history else (0, 0)

    def read(self, run: Path) -> list[Done]:
        """The steps in the metrics of a run of this order, without their times."""
        return [self._one(line) for line in read_metrics(run)]

    def _one(self, line: dict[str, Any], moment: float = 0.0) -> Done:
        assert self.order is not None
        ids = self.order.ids(line["step"] - 1)
        used = tuple(ids.tolist()) if sequence_hash(ids) == line["sequence_hash"] else ()
        return Done(line["step"], moment, line["world_size"], used, line["loss"])

    def _watch(self) -> None:
        """Take each line of the metrics as it comes: they tell no time, and those of lost steps do not stay."""
        seen = b""
        while not self._over.wait(LOOK_SECONDS):
            with contextlib.suppress(OSError):
                content = (self.run / METRICS).read_bytes()
                content = content[: content.rfind(b"\n") + 1]
                if content == seen:
                    continue
                self.order = self.order or self._order()
                same = len(seen) if content.startswith(seen) else _alike(content, seen)
                self.history += [self._one(json.loads(line), time.time()) for line in content[same:].splitlines()]
                seen = content

    def _order(self) -> Order:
        config = yaml.safe_load((self.run / "config.yaml").read_text())
        count = sequence_count(len(open_split(self.data, "train")), config["model"]["block_size"])
        return Order(count, config["global_batch"], config["seed"])


def _alike(content: bytes, other: bytes) -> int:
    """Length of the lines with which both begin."""
    pairs = zip(content.splitlines(keepends=True), other.splitlines(keepends=True), strict=False)
    return sum(len(mine) for mine, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


class Other:
    """An agent process a node, with the baseline as its worker; what happened is in OUT/steps.jsonl."""

    has_master = True
    way: str
    needs: str
    """The package that has to be there."""

    def __init__(self, data: Path, out: Path, nodes: int, flags: tuple[str, ...] = ()) -> None:
        self.data, self.out, self.most = data, out, nodes
        self.nodes = list[psutil.Popen]()
        self.script = [self.way, *flags, "--data", str(data), "--out", str(out)]
        self._lines, self._read = list[dict[str, Any]](), 0
        self._fresh()

    def _fresh(self) -> None:
        """The next agents are a job of their own."""
        self.name, self.first, self.port = f"drill-{secrets.token_hex(4)}", len(self.nodes), free_port()

    def __enter__(self) -> "Other":
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.running():
            self.kill(node)
        for line in self.lines():  # workers that outlived their agents
            with contextlib.suppress(psutil.Error):
                worker = psutil.Process(line["pid"])
                if str(self.out) in worker.cmdline():
                    worker.kill()

    def begin(self, nodes: int) -> None:
        """Start so many nodes, after the end of all there are."""
        for node in self.running():
            self.kill(node)
        self._fresh()
        for _ in range(nodes):
            self.add_node()

    def start_master(self) -> None: ...

    def kill_master(self) -> None: ...

    def start(self, command: list[str], log: str, **environment: str) -> psutil.Popen:
        common = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
        end_with_us = functools.partial(die_with_parent, os.getpid())
        with (self.out / log).open("ab") as output:
            return psutil.Popen(
                [sys.executable, *command], env=os.environ | common | environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True, preexec_fn=end_with_us,
            )  # fmt: skip

    def add_node(self) -> int:
        self.nodes.append(self.agent(len(self.nodes)))
        return len(self.nodes) - 1

    def agent(self, node: int) -> psutil.Popen:
        raise NotImplementedError

    def kill(self, node: int) -> None:
        """kill -9 of the agent and all that it started, the agent first."""
        with contextlib.suppress(psutil.Error):
            for process in [self.nodes[node], *self.nodes[node].children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    if "resource_tracker" not in " ".join(process.cmdline()):  # it tidies up, and ends by itself
                        process.kill()
        self.nodes[node].wait()

    def terminate(self, node: int) -> None:
        self.nodes[node].terminate()

    def running(self) -> list[int]:
        return [node for node, agent in enumerate(self.nodes) if agent.poll() is None]

    def workers_of(self, node: int) -> list[int]:
        with contextlib.suppress(psutil.Error):
            return [child.pid for child in self.nodes[node].children() if BASELINE in child.cmdline()]
        return []

    def lines(self) -> list[dict[str, Any]]:
        """All that workers have told so far, in their order."""
        path = self.out / "steps.jsonl"
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._read)
                whole, _, _ = file.read().rpartition(b"\n")
            self._lines += map(json.loads, whole.splitlines())
            self._read += len(whole) + 1 if whole else 0
        return self._lines

    def done(self) -> list[Done]:
        """All steps so far, those that were lost and done again too."""
        found: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for line in self.lines():
            if "step" in line:
                found.setdefault((line["life"], line["step"]), []).append(line)
        return sorted((_together(lines) for lines in found.values()), key=lambda one: one.time)

    def together(self, since: float) -> bool:
        """Whether the workers there are have done a step together, after `since` (seconds since 1970)."""
        here = {worker for node in self.running() for worker in self.workers_of(node)}
        steps: dict[tuple[int, int], set[int]] = {}
        for line in self.lines()[-20 * self.most :]:
            if "step" in line and line["time"] > since:
                steps.setdefault((line["life"], line["step"]), set()).add(line["pid"])
        return len(here) == len(self.running()) and here in steps.values()

    def position(self) -> tuple[int, int]:
        """The last step, and the workers that did it."""
        return next(((line["step"], line["world"]) for line in reversed(self.lines()) if "step" in line), (0, 0))


def _together(lines: list[dict[str, Any]]) -> Done:
    """What the workers of a world have told of one step."""
    ids = tuple(sequence for line in lines for sequence in line["ids"])
    loss = sum(line["loss"] * len(line["ids"]) for line in lines) / len(ids)
    return Done(lines[0]["step"], max(line["time"] for line in lines), lines[0]["world"], ids, loss)


class Torchrun(Other):
    """Plain torchrun, its c10d rendezvous on the first node, all settings at their defaults."""

    has_master = False
    way, needs = "file", "torch"

    def agent(self, node: int) -> psutil.Popen:
        if node == self.first + 1:  # the first node shall hold the store, which is whose agent listens first
            with socket.socket() as client:
                while self.nodes[self.first].poll() is None and client.connect_ex(("127.0.0.1", self.port)):
                    time.sleep(0.1)
        return self.start(
            [
                *("-m", "torch.distributed.run", f"--nnodes=1:{self.most}", "--nproc-per-node=1", "--max-restarts=100"),
                *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.port}", f"--rdzv-id={self.name}"),
                *("--local-addr=127.0.0.1", "-m", BASELINE, *self.script),
            ],
            f"node-{node}.log",
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",  # torch 2.13: else a node that joins ends the job
        )  # fmt: skip


class DLRover(Other):
    """DLRover as it comes, with its DdpCheckpointer; a local master started by hand, as --standalone fails on torch 2.13."""

    way, needs = "flash", "dlrover"
    master: psutil.Popen | None = None

    def __enter__(self) -> "DLRover":
        self.start_master()
        return self

    def begin(self, nodes: int) -> None:
        """Start so many nodes and a master, after the end of all there are."""
        for node in self.running():
            self.kill(node)
        self.kill_master()
        self._fresh()
        self.start_master()
        for _ in range(nodes):
            self.add_node()

    def start_master(self) -> None:
        command = ["-m", "dlrover.python.master.main", "--platform=local", "--port", str(self.port)]
        self.master = self.start([*command, f"--node_num={self.most}", f"--job_name={self.name}"], "master.log")

    def kill_master(self) -> None:
        if self.master:
            self.master.kill()
            self.master.wait()
        for left in [*Path("/dev/shm").glob(f"*{self.name}*"), *Path("/tmp/ckpt_sock").glob(f"*{self.name}*")]:
            if not self.running():
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)
        self.kill_master()

    def agent(self, node: int) -> psutil.Popen:
        rank = node - self.first
        return self.start(
            [
                *("-m", "dlrover.trainer.torch.elastic_run", f"--nnodes=1:{self.most}", "--nproc_per_node=1"),
                *("--max_restarts=100", "-m", BASELINE, *self.script),
            ],
            f"node-{node}.log",
            DLROVER_MASTER_ADDR=f"127.0.0.1:{self.port}", NODE_RANK=str(rank), NODE_ID=str(rank), WORKER_NUM=str(self.most),
            NODE_NUM=str(self.most), NODE_TYPE="worker", POD_IP="127.0.0.1", ELASTIC_JOB_NAME=f"{self.name}-{rank}",
        )  # fmt: skip


class TorchFT(Other):
    """torchft: a replica group of one worker a node, each under a torchrun of its own, and a lighthouse as documented."""

    way, needs = "torchft", "torchft"
    master: psutil.Popen | None = None

    def __enter__(self) -> "TorchFT":
        self.groups: dict[int, int] = {}  # node to number of its replica group
        self.start_master()
        return self

    def start_master(self) -> None:
        """Start the lighthouse, and wait until it listens: a group that finds none ends."""
        code = (
            "import signal; from torchft.coordination import LighthouseServer;"
            f" server = LighthouseServer(bind='127.0.0.1:{self.port}', min_replicas=1, join_timeout_ms=10000,"
            " quorum_tick_ms=100); signal.pause()"
        )
        self.master = self.start(["-c", code], "lighthouse.log")
        with socket.socket() as client:
            while self.master.poll() is None and client.connect_ex(("127.0.0.1", self.port)):
                time.sleep(0.1)

    def kill_master(self) -> None:
        if self.master:
            self.master.kill()
            self.master.wait()

    def _fresh(self) -> None:
        if self.master is None:  # else the lighthouse stays
            super()._fresh()

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)
        self.kill_master()

    def agent(self, node: int) -> psutil.Popen:
        taken = {self.groups[other] for other in self.running() if other != node}
        self.groups[node] = min(set(range(self.most)) - taken)
        return self.start(
            [
                *("-m", "torch.distributed.run", f"--master-port={free_port()}", "--nnodes=1", "--nproc-per-node=1"),
                *("--master-addr=127.0.0.1", "--max-restarts=10", "-m", BASELINE, *self.script),
            ],
            f"node-{node}.log",
            TORCHFT_LIGHTHOUSE=f"http://127.0.0.1:{self.port}", NUM_REPLICA_GROUPS=str(self.most),
            REPLICA_GROUP_ID=str(self.groups[node]),
        )  # fmt: skip


OTHERS: dict[str, type[Other]] = {"torchrun": Torchrun, "dlrover": DLRover, "torchft": TorchFT}


def check(name: str) -> None:
    """Raises ModuleNotFoundError where what a system needs is not installed."""
    importlib.import_module(OTHERS[name].needs)


def undisturbed(name: str, data: Path, out: Path, nodes: int, steps: int) -> list[Done]:
    """So many steps of what a system trains, to which nothing happens: in one process, torchft in as many as it has nodes."""
    system = OTHERS[name]
    flags = ("--undisturbed", f"--steps={steps}")
    if name == "torchft":
        with TorchFT(data, out, nodes, flags) as groups:
            groups.begin(nodes)
            while groups.running() and groups.position()[0] < steps:  # one that ends may wait long for the others
                time.sleep(0.1)
            return groups.done()
    job = system(data, out, 1, flags)
    job.script[0] = "file"  # what a checkpoint is kept by changes nothing where none is read
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job.port)}
    job.start(["-m", BASELINE, *job.script], "undisturbed.log", **place).wait()
    return job.done()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
