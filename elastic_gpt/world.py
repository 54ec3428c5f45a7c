"""Who is here: rank, size and device of this process; joining and leaving the group. The only reader of RANK and its kin.

A world lasts from one rendezvous to the next. When its members change, the agent restarts the workers and they join a new
one; nothing here survives that, and nothing else in the project may assume that a rank or a size does (law 7).
"""

import datetime
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from elastic_gpt.processes import die_with_parent

T = TypeVar("T")
Device = Literal["auto", "cpu", "cuda", "mps"]


class PeerLost(RuntimeError):
    """A peer vanished or stopped answering in the middle of a collective; the world has to be formed anew."""

    noticed_by: str | None = None
    """The node whose first worker noticed it."""


class NotJoined(PeerLost):
    """The world of this rendezvous could not be formed."""


@dataclass(frozen=True)
class World:
    """This process's place among the workers of one rendezvous."""

    rank: int
    size: int
    local_rank: int
    node: str
    """Name of this node: stable as long as its agent lives, never reused by another node of the job."""
    device: torch.device
    elastic: bool
    """Whether an agent started this worker and will restart it."""

    @property
    def first(self) -> bool:
        """Whether this worker does what is done once in a world (rank 0's work)."""
        return self.rank == 0

    @property
    def first_of_node(self) -> bool:
        return self.local_rank == 0

    def sum(self, values: torch.Tensor) -> None:
        """Replace `values` by its sum over all ranks."""
        if self.size > 1:
            self._collective(lambda: dist.all_reduce(values))

    def gather(self, value: Any) -> list[Any]:
        """`value` (picklable, small) of every rank, in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._collective(lambda: dist.all_gather_object(values, value))
        return values

    def broadcast(self, tensors: list[torch.Tensor], source: int) -> None:
        """Replace `tensors` everywhere by those of rank `source`."""
        if self.size > 1:
            for tensor in tensors:
                # NCCL moves no CPU tensors, and AdamW may keep its step count on the CPU.
                there = tensor.to(self.device)
                self._collective(lambda there=there: dist.broadcast(there, source))
                if there is not tensor:
                    tensor.copy_(there)

    def first_does(self, work: Callable[[], T]) -> T:
        """Have rank 0 do `work` and give its result, or its error, to every rank.

        It may take longer than a collective waits for a silent peer: the ranks keep in touch meanwhile.
        """
        if self.size == 1:
            return work()
        with ThreadPoolExecutor(1) as background:
            future = background.submit(work) if self.first else None
            while not self.gather(future.done() if future else None)[0]:
                time.sleep(0.02)
        error = future.exception() if future else None
        result, error = self.gather((future.result() if future and not error else None, error))[0]
        if error:
            raise error
        return result

    def _collective(self, run: Any) -> None:
        try:
            run()
        except (RuntimeError, ValueError) as error:  # gloo and NCCL have no narrower type for a lost peer
            lost = PeerLost(f"rank {self.rank} of {self.size} lost a peer: {error}")
            lost.noticed_by = self.node if self.first_of_node else None
            raise lost from error


def join(device: Device, timeout_seconds: float) -> World:
    """Join the group that the agent (DLRover's or torchrun) announced in the environment, or be a world of one.

    Args:
        timeout_seconds: how long a collective waits for a peer that says nothing before the world is given up.
    """
    elastic = "TORCHELASTIC_RUN_ID" in os.environ
    if elastic:
        die_with_parent(os.getppid())  # for plain torchrun: a worker of ours has done so at its birth
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    # A replaced node is a new pod. Under plain torchrun the agent's process id tells nodes apart.
    node = os.environ.get("POD_NAME") or (f"{socket.gethostname()}-{os.getppid()}" if elastic else "single")
    kind = _pick(device)
    where = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(where)
    if size > 1:
        timeout = datetime.timedelta(seconds=timeout_seconds)
        try:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timeout)
        except RuntimeError as error:  # a peer of this rendezvous died before it came here
            raise NotJoined(f"rank {rank} of {size} could not join its peers: {error}") from error
    return World(rank, size, local_rank, node, where, elastic)


def leave() -> None:
    """Leave the group, whatever state it is in."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Signals:
    """What this worker was asked to do; read once a step.

    Our agent (launch.py) sends SIGTERM when it restarts its workers because the members change, and SIGUSR1 first when the
    node itself has to go. Any other SIGTERM, Ctrl-C, and a terminal that closes (SIGHUP) may mean going for good. A second
    Ctrl-C stops at once, but not under our agent: there one key reaches a worker from the terminal and by way of its client.
    """

    def __init__(self) -> None:
        self.stop = False
        self.leave = False
        """What this node knows has to be on storage: it may be going."""
        self.released = False
        """Whoever started this worker starts no other."""
        self.number = 0
        self._since = 0.0
        self.told_apart = "DLROVER_MASTER_ADDR" in os.environ
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._asked)

    @property
    def waited(self) -> float:
        """Seconds since the first signal; 0 without one."""
        return time.monotonic() - self._since if self.stop else 0.0

    def _asked(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT and self.stop and not self.told_apart:
            raise KeyboardInterrupt
        self._since = self._since or time.monotonic()
        self.stop, self.number = True, number
        self.leave = self.leave or number != signal.SIGTERM or not self.told_apart
        self.released = self.released or number == signal.SIGUSR1 or not self.told_apart


def _pick(device: Device) -> str:
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
