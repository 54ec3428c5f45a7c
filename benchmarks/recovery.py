"""The same kills for ElasticGPT, plain torchrun with a disk checkpoint, and stock DLRover with its DdpCheckpointer.

    python benchmarks/recovery.py [--systems ours torchrun dlrover] [--limit 60]

Three local nodes, one worker with one CPU thread each, the same small GPT and data; memory saves
(where a system has them) every 10 steps, checkpoints every 50. Each event strikes half-way between
two saves, in a full job; a node joins a job of two. A master that is killed and restarted stops no
training by itself: what is measured is the next recovery, that of a killed worker. torchrun's c10d
has no master apart from node 0. The baselines are held to 25 ms a step; ours takes what it takes
(25 to 60 ms on two cores). Prints the seconds from the event to the first step completed by the new
world, and the steps that had to be done again. A system that has not recovered after --limit
seconds is started anew for the next event.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import psutil
from recovery_baseline import DISK_INTERVAL, MEMORY_INTERVAL
from rich.console import Console
from rich.table import Table

from elastic_gpt.contract import shared_memory
from elastic_gpt.ledger import Ledger, read_metrics
from elastic_gpt.nodes.local import LocalJob

NODES = 3  # also the most a job may have: the stock rendezvous closes at once only when it is full
MASTER = "master killed, restarted"
EVENTS = {  # nodes in the job before it, in an order that reuses a job
    "kill -9 of a worker": NODES,
    "kill -9 of a node": NODES,
    "a node joins": NODES - 1,
    "SIGTERM to a node": NODES,
    "kill -9 of rank 0's node": NODES,
    MASTER: NODES,
}
START_SECONDS = 150.0  # a stock DLRover job that is not full waits 60 s for more nodes


class TooLate(Exception):
    """Something did not happen in time."""


class Job(Protocol):
    """A system under test: a running job with numbered nodes."""

    def add_node(self) -> int: ...
    def kill(self, node: int) -> None: ...
    def terminate(self, node: int) -> None: ...
    def running(self) -> list[int]: ...
    def workers_of(self, node: int) -> list[int]: ...
    def kill_master(self) -> None: ...
    def start_master(self) -> None: ...
    def position(self) -> tuple[int, int]:
        """The last completed step, and the size of the world that did it."""

    def recovery(self, since: float) -> tuple[float, int] | None:
        """When a world that began after `since` completed its first step, and the steps done again; None if none has."""


class Ours(LocalJob):
    """ElasticGPT; what happened is in its ledger and metrics."""

    def __init__(self, data: Path, out: Path) -> None:
        command = [
            *("train", "debug_cpu", "--data.dir", str(data), "--run-dir", str(out / "run"), "--steps=1000000"),
            *("--device=cpu", "--observe.tensorboard=false", "--evaluate.interval=0"),
            *(f"--checkpoint.interval={DISK_INTERVAL}", f"--elastic.snapshot-interval={MEMORY_INTERVAL}"),
        ]
        super().__init__(command, least=1, most=NODES, threads=1, say=lambda _: None)
        self.run = out / "run"

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)
        shutil.rmtree(shared_memory() / Ledger(self.run).run_id(), ignore_errors=True)

    def position(self) -> tuple[int, int]:
        last = read_metrics(self.run)[-1:] if (self.run / "metrics.jsonl").exists() else []
        return (last[0]["step"], last[0]["world_size"]) if last else (0, 0)

    def recovery(self, since: float) -> tuple[float, int] | None:
        events = [event for event in Ledger(self.run).events() if event["time"] >= since]
        dropped = sum(event["dropped"] for event in events if event["event"] == "restored")
        return next(((event["time"], dropped) for event in events if event["event"] == "recovered"), None)


class Baseline:
    """An agent process a node, with recovery_baseline.py as its worker; what happened is in OUT/steps.jsonl."""

    flags: tuple[str, ...] = ()

    def __init__(self, data: Path, out: Path) -> None:
        self.out, self.nodes = out, list[psutil.Popen]()
        self.name = f"recovery-{os.getpid()}-{time.time_ns() % 10**9}"
        self.script = [str(Path(__file__).with_name("recovery_baseline.py")), *self.flags]
        self.script += ["--data", str(data), "--out", str(out)]
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]

    def __enter__(self) -> "Baseline":
        return self

    def __exit__(self, *_: object) -> None:
        for node in range(len(self.nodes)):
            self.kill(node)
        for line in self.lines():  # workers that outlived their agents
            with contextlib.suppress(psutil.Error):
                worker = psutil.Process(line["pid"])
                if str(self.out) in worker.cmdline():
                    worker.kill()

    def start(self, command: list[str], log: str, **environment: str) -> psutil.Popen:
        common = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
        with (self.out / log).open("ab") as output:
            return psutil.Popen(
                [sys.executable, "-m", *command], env=os.environ | common | environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True,
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
            return [child.pid for child in self.nodes[node].children() if self.script[0] in child.cmdline()]
        return []

    def lines(self, steps: bool = False) -> list[dict[str, Any]]:
        path = self.out / "steps.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in found if "step" in line or not steps]

    def position(self) -> tuple[int, int]:
        last = self.lines(steps=True)[-1:]
        return (last[0]["step"], last[0]["world"]) if last else (0, 0)

    def recovery(self, since: float) -> tuple[float, int] | None:
        steps = self.lines(steps=True)
        before = {line["pid"] for line in steps if line["time"] < since}
        old = [line["step"] for line in steps if line["pid"] in before]
        new = [line for line in steps if line["pid"] not in before]
        # The data position is the step, so a step that is done again is all that can be lost.
        return (new[0]["time"], old[-1] + 1 - new[0]["step"]) if new else None


class Torchrun(Baseline):
    """Plain torchrun, its c10d rendezvous on node 0, all settings at their defaults."""

    def agent(self, node: int) -> psutil.Popen:
        if node == 1:  # node 0 shall hold the store, which is whose agent listens first
            with socket.socket() as client:
                while self.nodes[0].poll() is None and client.connect_ex(("127.0.0.1", self.port)):
                    time.sleep(0.1)
        return self.start(
            [
                *("torch.distributed.run", f"--nnodes=1:{NODES}", "--nproc-per-node=1", "--max-restarts=100"),
                *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.port}", f"--rdzv-id={self.name}"),
                *("--local-addr=127.0.0.1", *self.script),
            ],
            f"node-{node}.log",
        )


class DLRover(Baseline):
    """Stock dlrover-run with DdpCheckpointer; its local master is started by hand, as --standalone fails on torch 2.13."""

    flags = ("--flash",)

    def __enter__(self) -> "Baseline":
        self.start_master()
        return self

    def start_master(self) -> None:
        command = ["dlrover.python.master.main", "--platform=local", "--port", str(self.port)]
        self.master = self.start([*command, f"--node_num={NODES}", f"--job_name={self.name}"], "master.log")

    def kill_master(self) -> None:
        self.master.kill()
        self.master.wait()

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)
        self.kill_master()
        for left in [*Path("/dev/shm").glob(f"*{self.name}*"), *Path("/tmp/ckpt_sock").glob(f"*{self.name}*")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)

    def agent(self, node: int) -> psutil.Popen:
        return self.start(
            [
                *("dlrover.trainer.torch.elastic_run", f"--nnodes=1:{NODES}", "--nproc_per_node=1"),
                *("--max_restarts=100", *self.script),
            ],
            f"node-{node}.log",
            DLROVER_MASTER_ADDR=f"127.0.0.1:{self.port}", NODE_RANK=str(node), NODE_ID=str(node), NODE_NUM=str(NODES),
            WORKER_NUM=str(NODES), NODE_TYPE="worker", POD_IP="127.0.0.1", ELASTIC_JOB_NAME=f"{self.name}-{node}",
        )  # fmt: skip


SYSTEMS: dict[str, Callable[[Path, Path], Any]] = {"ours": Ours, "torchrun": Torchrun, "dlrover": DLRover}


def wait(job: Job, condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if not job.running():
            raise TooLate("all nodes ended")
        if time.monotonic() > deadline:
            raise TooLate(f"not in {seconds:.0f} s")
        time.sleep(0.05)


def bring(job: Job, nodes: int) -> None:
    """Wait for a world of `nodes` nodes, then for a moment half-way between two checkpoints and two memory saves."""
    while len(job.running()) > nodes:
        job.kill(max(job.running()))

    def complete() -> bool:
        while len(job.running()) < nodes:  # one that got SIGTERM may take its time to go
            job.add_node()
        return job.position()[1] == nodes

    wait(job, complete, START_SECONDS)
    first = job.position()[0]
    goal = (first // DISK_INTERVAL + 1) * DISK_INTERVAL + DISK_INTERVAL // 2
    wait(job, lambda: job.position()[0] >= goal, START_SECONDS)


def strike(job: Job, event: str) -> float:
    """Let an event happen. Returns its time in seconds since 1970."""
    first, *_, last = job.running()  # in all three systems rank 0 is on the node that is there longest
    if event == MASTER:
        job.kill_master()
        job.start_master()
        bring(job, EVENTS[event])  # training goes on
    moment = time.time()
    if event in ("kill -9 of a worker", MASTER):
        for worker in job.workers_of(last):
            os.kill(worker, signal.SIGKILL)
    elif event == "kill -9 of a node":
        job.kill(last)
    elif event == "kill -9 of rank 0's node":
        job.kill(first)
    elif event == "SIGTERM to a node":
        job.terminate(last)
    else:
        job.add_node()
    return moment


def measure(system: str, data: Path, scratch: Path, events: list[str], limit: float) -> Iterator[tuple[str, str, str]]:
    """Yields event, seconds and steps lost, in the table's words."""
    with contextlib.ExitStack() as stack:
        job: Any = None
        for event in events:
            if event == MASTER and not hasattr(SYSTEMS[system], "start_master"):
                yield event, "n/a", ""
                continue
            for _ in range(2):
                if job is None:
                    out = Path(tempfile.mkdtemp(prefix=f"{system}-", dir=scratch))
                    job = stack.enter_context(SYSTEMS[system](data, out))
                try:
                    bring(job, EVENTS[event])
                    break
                except TooLate as error:
                    print(f"{system}: no job for `{event}`: {error}", flush=True)
                    stack.close()
                    job = None
            if job is None:
                yield event, "no job to measure", ""
                continue
            try:
                start = strike(job, event)
                wait(job, functools.partial(job.recovery, start), limit)
                moment, lost = job.recovery(start)
                yield event, f"{moment - start:.1f}", str(lost)
            except TooLate as error:
                yield event, f"not recovered: {error}", "-"
                stack.close()
                job = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--events", nargs="+", choices=list(EVENTS), default=list(EVENTS))
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a recovery may take (default: 60)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the jobs are ended
    cells: dict[tuple[str, str], str] = {}
    scratch = Path(tempfile.mkdtemp(prefix="recovery-"))
    print(f"logs: {scratch}", flush=True)
    prepare = ["prepare", "--sample", "--tokenizer", "char", "--output-dir", str(scratch / "data")]
    subprocess.run([sys.executable, "-m", "elastic_gpt.cli", *prepare], check=True, stdout=subprocess.DEVNULL)
    for system in args.systems:
        for event, seconds, lost in measure(system, scratch / "data", scratch, args.events, args.limit):
            cells[system, event] = f"{seconds} s, {lost}" if lost.lstrip("-").isdigit() else seconds
            print(f"{system:<9} {event:<25} {seconds}; steps lost: {lost}", flush=True)
    table = Table("event (seconds to the next step, steps lost)", *args.systems)
    for event in args.events:
        table.add_row(event, *(cells[system, event] for system in args.systems))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
