"""Several nodes on this machine, each of them an agent process: for first runs, the demo, the drill and the tests."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from elastic_gpt.contract import shared_memory
from elastic_gpt.nodes.private import VARIABLE
from prepare.frontdoor import USERS_MISTAKE


class MasterError(OSError):
    """DLRover's job master did not start."""


class LocalJob:
    """A DLRover master and nodes on this machine, each node an agent process with its workers.

    A context manager; at its end no process is left. Nodes are numbered from 0, and numbers are
    never used again.

    Args:
        command: the command of each worker, such as ["train", "debug_cpu", ...].
        least, most: how many nodes the job may have.
        workers: worker processes on each node.
        threads: CPU threads of each worker; by default the cores are shared out over `most` nodes.
        say: called with each line of output for a person.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        least: int,
        most: int,
        workers: int = 1,
        threads: int | None = None,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self.command, self.least, self.most, self.workers, self.say = list(command), least, most, workers, say
        self.threads = threads or max(1, (os.cpu_count() or 1) // (most * workers))
        self.name = f"egpt-{secrets.token_hex(3)}"
        self.logs = Path(tempfile.mkdtemp(prefix=f"elastic-gpt-{self.name}-"))  # only this user can read it
        self.nodes: list[subprocess.Popen[str]] = []
        self.readers: list[threading.Thread] = []
        self.master: subprocess.Popen[bytes] | None = None
        self._reserved = _free_port()
        self.port = int(self._reserved.getsockname()[1])

    def __enter__(self) -> "LocalJob":
        self.say(f"logs: {self.logs}")
        self.start_master()
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self.nodes:  # their snapshots stay, so that the same command goes on from them
            _kill_group(agent)
        self.kill_master()
        for reader in self.readers:
            reader.join(timeout=5)
        self._reserved.close()

    def start_master(self) -> None:
        """Start DLRover's job master, and wait until it listens."""
        arguments = (self.port, self.most, self.name, os.getpid(), self.master is not None)
        code = f"from elastic_gpt.nodes.master import run_local; run_local{arguments!r}"
        with (self.logs / "master.log").open("ab") as log:
            self.master = subprocess.Popen(
                [sys.executable, "-c", code], stdout=log, stderr=log, stdin=subprocess.PIPE, start_new_session=True,
                env=os.environ | {VARIABLE: str(self.logs / "dlrover-master")},
            )  # fmt: skip
        self.say(f"[master] process {self.master.pid}, 127.0.0.1:{self.port}")
        deadline = time.monotonic() + 180  # importing it takes long on a busy machine
        while not _listens(self.port):
            if self.master.poll() is not None or time.monotonic() > deadline:
                raise MasterError(f"the DLRover master did not start: see {self.logs / 'master.log'}")
            time.sleep(0.1)

    def kill_master(self) -> None:
        if self.master:
            _kill_group(self.master)

    def add_node(self) -> int:
        """Start one more node and return its number."""
        node = len(self.nodes)
        environment = os.environ | {
            "DLROVER_MASTER_ADDR": f"127.0.0.1:{self.port}",
            "NODE_RANK": str(node),
            "NODE_ID": str(node),
            "NODE_NUM": str(self.most),
            "WORKER_NUM": str(self.most),
            "NODE_TYPE": "worker",
            "POD_IP": "127.0.0.1",
            "POD_NAME": self.node_name(node),
            "ELASTIC_JOB_NAME": self.node_name(node),  # names DLRover's sockets, so it differs between nodes
            VARIABLE: str(self.logs / f"dlrover-{node}"),
            "ELASTIC_GPT_LOCAL": f"{os.getpid()}:{self.logs / 'finished'}",  # see launch.run_node
            "GLOO_SOCKET_IFNAME": "lo" if sys.platform.startswith("linux") else "lo0",
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONUNBUFFERED": "1",
        }
        agent = subprocess.Popen(
            [
                *(sys.executable, "-m", "elastic_gpt.cli", "launch"),
                *(f"--nnodes={self.least}:{self.most}", f"--nproc={self.workers}", "--", *self.command),
            ],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        self.nodes.append(agent)
        self.say(f"[node {node}] process {agent.pid}")
        threading.Thread(target=self._tell_end, args=(node,), daemon=True).start()
        for stream in (agent.stdout, agent.stderr):
            reader = threading.Thread(target=self._relay, args=(node, stream, stream is agent.stdout), daemon=True)
            reader.start()
            self.readers.append(reader)
        return node

    def node_name(self, node: int) -> str:
        return f"{self.name}-node-{node}"

    def running(self) -> list[int]:
        """Numbers of the nodes whose agent lives."""
        return [node for node, agent in enumerate(self.nodes) if agent.poll() is None]

    def finished(self) -> bool:
        """Whether a node saw the job reach its end."""
        return (self.logs / "finished").exists()

    def can_go_on(self) -> bool:
        """Whether there are enough nodes for a world. Nodes that ended are not replaced here."""
        return self.finished() or len(self.running()) >= self.least

    def standby_of(self, node: int) -> int | None:
        """Process id of a node's standby; None if it has none."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.nodes[node].pid).children():
                if "elastic_gpt.nodes.standby" in " ".join(child.cmdline()):
                    return child.pid
        return None

    def workers_of(self, node: int) -> list[int]:
        """Process ids of a node's workers: children of its standby, or of its agent if it has no standby."""
        with contextlib.suppress(psutil.Error):
            standby = self.standby_of(node)
            forked = psutil.Process(standby).children() if standby else []
            started = psutil.Process(self.nodes[node].pid).children()
            return [child.pid for child in forked + [one for one in started if "elastic_gpt.cli" in one.cmdline()]]
        return []

    def kill_agent(self, node: int) -> None:
        """kill -9 of a node's agent only. All that it started has to end by itself."""
        self.nodes[node].kill()
        self.nodes[node].wait()

    def kill(self, node: int) -> None:
        """kill -9 of a whole node, including its snapshots in shared memory."""
        _kill_group(self.nodes[node])
        for folder in shared_memory().glob(f"*/{self.node_name(node)}"):
            shutil.rmtree(folder, ignore_errors=True)

    def terminate(self, node: int) -> None:
        """Send SIGTERM as a preemption does: the node saves its state and leaves."""
        if self.nodes[node].poll() is None:
            self.nodes[node].terminate()

    def exit_code(self) -> int:
        """0 if a node saw the job finish; else the exit code of the node that failed. Says where its log is."""
        codes = [agent.wait() for agent in self.nodes]
        if self.finished():
            return 0
        # A user's mistake tells most, then a failure of its own. Other nodes were stopped because of it.
        node = min(range(len(codes)), key=lambda number: (codes[number] != USERS_MISTAKE, codes[number] <= 0))
        self.say(f"error: no node finished the job; node {node} ended with {codes[node]}: see {self.log(node)}")
        return codes[node] if codes[node] > 0 else 1

    def log(self, node: int) -> Path:
        return self.logs / f"node-{node}.log"

    def _tell_end(self, node: int) -> None:
        """Tell the master when a node has ended, as Kubernetes does, so that no world waits for it."""
        self.nodes[node].wait()
        with contextlib.suppress(OSError, ValueError):  # the master may have ended as well
            if self.master and self.master.stdin:
                self.master.stdin.write(f"{node}\n".encode())
                self.master.stdin.flush()

    def _relay(self, node: int, stream: Any, output: bool) -> None:
        """Write all output of a node to its log. Lines of workers for a person are also shown, with the node's number."""
        with self.log(node).open("a", encoding="utf-8") as log:
            for line in stream:
                log.write(line)
                log.flush()
                if (output and "torch_musa" not in line) or line.startswith(
                    ("error:", "warning:")
                ):  # a line of DLRover
                    self.say(f"[node {node}] {line.rstrip()}")


def _kill_group(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> socket.socket:
    """A bound socket, which reserves its port for the master, also between two masters.

    gRPC servers set SO_REUSEPORT, so they can share the port with a socket of the same user that
    sets it too.
    """
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(("127.0.0.1", 0))
    return bound


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
