"""The drill without DLRover: the same faults on nodes of plain torchrun, except those that it does not survive.

The store of torchrun's rendezvous is in the drill's own process, since without it all nodes end
(docs/ELSEWHERE.md). There is no standby, and all workers end at each membership change, so the loss
of any node costs the steps since the last snapshot.
"""

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from elastic_gpt.drill.faults import JOIN, SNAPSHOT_INTERVAL, Faults
from elastic_gpt.nodes.local import LocalJob

RESTARTS = 1000  # each membership change costs every node one


class TorchrunJob(LocalJob):
    """A LocalJob whose nodes are agents of torchrun."""

    def start_master(self) -> None:
        """Start the store in which torchrun's agents meet."""
        from torch.distributed import TCPStore

        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def kill_master(self) -> None:
        """Stop the store, after all nodes have ended."""
        del self.store

    def add_node(self) -> int:
        """Start one more node and return its number."""
        node = len(self.nodes)
        environment = (
            os.environ
            | {
                "POD_NAME": self.node_name(node),
                "GLOO_SOCKET_IFNAME": "lo" if sys.platform.startswith("linux") else "lo0",
                "OMP_NUM_THREADS": str(self.threads),
                "PYTHONUNBUFFERED": "1",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # torch 2.13: with a shared store, a joining node is told no address
            }
        )
        agent = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={self.least}:{self.most}"),
                *(f"--nproc-per-node={self.workers}", f"--max-restarts={RESTARTS}", "--local-addr=127.0.0.1"),
                *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.store.port}", f"--rdzv-id={self.name}"),
                "--rdzv-conf=is_host=0,last_call_timeout=2,keep_alive_interval=1",
                *("--no-python", sys.executable, "-m", "elastic_gpt.cli", *self.command),
            ],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        self.nodes.append(agent)
        for stream in (agent.stdout, agent.stderr):
            reader = threading.Thread(target=self._relay, args=(node, stream, stream is agent.stdout), daemon=True)
            reader.start()
            self.readers.append(reader)
        return node

    def finished(self) -> bool:
        """Whether a node saw the job reach its end."""
        return any(agent.poll() == 0 for agent in self.nodes)


class TorchrunFaults(Faults):
    """The faults that are possible without a master and standbys, and what they may cost."""

    def __init__(self, job: LocalJob, run: Path, nodes: int, dice: random.Random) -> None:
        super().__init__(job, run, nodes, dice)
        self.kinds = {
            "kill -9 of a worker": self._costly(self.kill_worker),
            "kill -9 of an agent": self._costly(self.kill_agent),
            "kill -9 of a node": self._costly(self.kill_node),
            "SIGTERM to a node": self.preempt,
            "SIGTERM to all nodes": self.preempt_all,
            "kill -9 of all nodes": self.kill_all,
            JOIN: self.join,
            "storage fault": self.storage_fault,
        }

    def _costly(self, fault: Callable[[], tuple[int | None, int]]) -> Callable[[], tuple[int | None, int]]:
        def do() -> tuple[int | None, int]:
            node, _ = fault()
            return node, 2 * SNAPSHOT_INTERVAL

        return do
