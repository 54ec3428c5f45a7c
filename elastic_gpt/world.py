"""The world of this process: its rank, size and device, and how to join and leave. Only this module reads RANK and the like.

A world lasts from one rendezvous to the next. When its members change, the workers leave it and
join another one. Those that live on do so in the same process, with another rank and size (law 7).
"""

import datetime
import functools
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist

from elastic_gpt import devices
from elastic_gpt.processes import die_with_parent
from elastic_gpt.settings import Device

T = TypeVar("T")
V = TypeVar("V")
HOST = torch.device("cpu")
PARCEL = 32 << 20  # bytes in one broadcast
TOUCH_SECONDS = 0.5  # between two signs of life of a rank that others wait for
MEET_TIMEOUT = datetime.timedelta(seconds=1)  # for one try to reach the store of a new group
LOOK_SECONDS = 0.005  # between two looks whether the others are there
LEAVE_SECONDS = 5.0  # in which a group with a dead member has to be torn down
CLOSE_SECONDS = 0.05  # for the connections of a group that was left to close; half of that is usual
STILL_TIMEOUT = datetime.timedelta(seconds=0.1)  # of a collective, between two looks whether its peers are still there
POLL_SECONDS = 0.0002  # between two looks whether the device has done a collective
# Collectives on the device whose end the host has not seen. Its queue holds some more, then a launch blocks.
QUEUED = 64
PROBE = 1 << 20  # tag of messages that nobody sends


class PeerLost(RuntimeError):
    """A peer disappeared or stopped answering during a collective. A new world has to be formed."""

    noticed_by: str | None = None
    """Name of the node whose first worker noticed it."""
    given_up: bool = False
    """Whether gloo still waits for the rest of a message, and may write into what was to be summed when it comes."""
    stuck: bool = False
    """Whether the device could not be freed of what the peer was to answer, so that this process is of no more use."""


class NotJoined(PeerLost):
    """The world of this rendezvous could not be formed."""


@dataclass(frozen=True)
class World:
    """The place of this process among the workers of one rendezvous."""

    rank: int
    size: int
    local_rank: int
    node: str
    """Name of this node. Stays while its agent lives; no other node of the job ever has it."""
    device: torch.device
    elastic: bool
    """Whether an agent started this worker and will restart it."""
    called: Callable[[], bool] = field(default=lambda: False, compare=False)
    """Tells whether the members change. Asked in a collective that stands still, in any thread."""
    patience: float = field(default=math.inf, compare=False)
    """Seconds after which a peer that does not answer on the device is lost (gloo has this limit itself)."""
    _queued: deque[dist.Work] = field(default_factory=deque, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this worker is rank 0, which does what has to be done once in a world."""
        return self.rank == 0

    @property
    def first_of_node(self) -> bool:
        return self.local_rank == 0

    def sum(self, values: torch.Tensor) -> None:
        """Replace `values` by its sum over all ranks. On a GPU that is only begun, and `settle` ends it."""
        if self.size > 1:
            self._collective(lambda: dist.all_reduce(values, async_op=True), values.device, waits="nobody")

    def exchange(self, rows: torch.Tensor) -> torch.Tensor:
        """Give the n-th of `rows` (size, ...) to rank n; return the rows that the ranks gave this one, in order of rank.

        On a GPU that is only queued, and what is queued later comes after it; `settle` tells whether it has ended.
        """
        came = torch.empty_like(rows)
        self._collective(lambda: dist.all_to_all_single(came, rows, async_op=True), rows.device, waits="device")
        return came

    def settle(self) -> None:
        """Wait until the device has ended the sums and exchanges that were queued. They end in their order.

        What is queued after this can wait for no peer any more. Raises PeerLost if one does not answer.
        """
        if self._queued:
            last = self._queued.pop()
            self._queued.clear()
            self._collective(lambda: last, self.device)

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in order of rank, on every rank. It has to be small and picklable.

        So small that the kernel takes it at once, and it comes whole or not at all (see _wait).
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._collective(lambda: dist.all_gather_object(values, value))
        return values

    def broadcast(self, tensors: list[torch.Tensor], source: int) -> None:
        """Replace `tensors` on all ranks by those of rank `source`. Small ones are sent together."""
        if self.size == 1:
            return
        for together in _parcels(tensors):
            # NCCL moves no CPU tensors, and AdamW may keep its step count on the CPU.
            flat = torch.cat([tensor.reshape(-1).to(self.device) for tensor in together])
            self._collective(functools.partial(dist.broadcast, flat, source, async_op=True), self.device)
            if self.rank != source:
                parts = flat.split([tensor.numel() for tensor in together])
                for tensor, part in zip(together, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))

    def first_does(self, work: Callable[[], T]) -> T:
        """Let rank 0 do `work`. Every rank returns its result or raises its error.

        The work may take longer than a collective waits for a silent peer, since rank 0 sends signs
        of life.
        """
        return self.first_does_beside(work, None)[0]

    def first_does_beside(self, work: Callable[[], T], value: V) -> tuple[T, list[V]]:
        """As `first_does`, and the `value` of every rank travels with the first sign of life; see `gather`."""
        if self.size == 1:
            return work(), [value]
        with ThreadPoolExecutor(1) as background:
            future = background.submit(work) if self.first else None
            values: list[V] = []
            while True:
                ended = bool(future and wait([future], TOUCH_SECONDS).done)
                error = future.exception() if future and ended else None
                # An exception is sent without its cause, by which a passing fault of storage is told from a user's mistake.
                mine = (ended, future.result() if future and ended and not error else None, (error, _cause(error)))
                told = self.gather((*mine, None if values else value))
                values = values or [one for *_, one in told]
                ended, result, (error, cause), _ = told[0]
                if ended:
                    break
        if error:
            raise error from cause
        return result, values

    def _collective(
        self,
        begin: Callable[[], dist.Work | None],
        on: torch.device = HOST,
        waits: Literal["host", "device", "nobody"] = "host",
    ) -> None:
        """Do a collective.

        Args:
            begin: returns what is to be waited for; None: it has waited itself.
            on: where its tensors are.
            waits: who waits for it where it is queued on the device: this thread, what is queued there later, or nobody
                yet. Elsewhere this thread waits.
        """
        work, queued = None, devices.queues(on)
        try:
            if (work := begin()) is None:
                return
            if waits == "host" or not queued:
                self._wait(work, queued)
                return
            if waits == "device":
                work.block_current_stream()
            self._queued.append(work)
            if len(self._queued) > QUEUED:
                self._wait(self._queued.popleft(), queued)
            return
        except (RuntimeError, ValueError) as error:  # gloo and NCCL have no narrower type for a lost peer
            why, given_up = str(error), work is not None and not queued and not work.is_completed()
            # The frames of its traceback refer to the group, whose connections would stay open, and other peers wait for them.
            work = work if queued else None
            self._queued.clear()
            traceback.clear_frames(error.__traceback__)
        lost = PeerLost(f"rank {self.rank} of {self.size} lost a peer: {why}")
        lost.noticed_by = self.node if self.first_of_node else None
        lost.given_up = given_up
        lost.stuck = devices.queues(self.device) and not self._freed(work)
        raise lost

    def _wait(self, work: dist.Work, queued: bool) -> None:
        """Wait for a collective. One that cannot end any more is given up, which may take gloo's timeout in the background.

        If a peer dies in the middle of a message, gloo closes the connection, but does not tell whoever waits for the rest. It
        refuses only what begins later, so a message that nobody sends is asked for. NCCL tells of a peer of another node that
        its connection broke, and of others nothing; gloo's connections are there beside it.
        """
        deadline = time.monotonic() + self.patience
        while not _ended(work, queued):
            # Peers may just be slow; and gloo remembers what was asked for until the group is left.
            if self.called():
                for peer in set(range(self.size)) - {self.rank}:
                    dist.irecv(torch.empty(1), peer, tag=PROBE)  # raises if the connection is closed
            if queued and time.monotonic() > deadline:
                raise RuntimeError(f"a peer has not answered for {self.patience:g} s")

    def _freed(self, work: dist.Work | None) -> bool:
        """Leave this world at once, before anybody waits for the device. Whether nothing of it stands still there any more."""
        try:
            return leave(self.device) and (work is None or work.is_completed())
        except RuntimeError:  # the device is lost
            return False


def _ended(work: dist.Work, queued: bool) -> bool:
    """Look at a collective for STILL_TIMEOUT. Returns whether it has ended well; raises what went wrong.

    Args:
        queued: whether it is on the device's queue. There a wait with a limit would abort it when the time is over.
    """
    if queued:
        until = time.monotonic() + STILL_TIMEOUT.total_seconds()
        while not work.is_completed():
            if time.monotonic() > until:
                return False
            time.sleep(POLL_SECONDS)
    else:
        try:
            work.wait(STILL_TIMEOUT)
            return True
        except RuntimeError:
            if not work.is_completed():  # else it has ended only just now
                return False
    work.wait()  # raises what went wrong, if anything did
    return True


def _parcels(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Groups neighbouring tensors of one type, up to PARCEL bytes; a larger tensor is alone."""
    parcel: list[torch.Tensor] = []
    for tensor in tensors:
        if parcel and (tensor.dtype != parcel[0].dtype or sum(one.nbytes for one in parcel) + tensor.nbytes > PARCEL):
            yield parcel
            parcel = []
        parcel.append(tensor)
    if parcel:
        yield parcel


def _cause(error: BaseException | None) -> OSError | None:
    """The system's error behind an exception, as one that can be sent."""
    cause = error and error.__cause__
    return OSError(cause.errno, cause.strerror) if isinstance(cause, OSError) else None


def place(device: Device) -> torch.device:
    """The device that this worker computes on, in all of its worlds."""
    return devices.pick(device, int(os.environ.get("LOCAL_RANK", 0)))


def join(device: Device, timeout_seconds: float, called: Callable[[], bool] = lambda: False) -> World:
    """Join the group that the agent (ours, DLRover's or torchrun's) put into the environment, or be a world of one.

    Args:
        device: kind of device to compute on.
        timeout_seconds: how long a collective waits for a silent peer before it gives up.
        called: tells whether the members change again, so that waiting for missing or lost peers is useless.

    Raises:
        NotJoined: if a peer does not come.
        PeerLost: if this worker was called away before all had come.
    """
    elastic = "TORCHELASTIC_RUN_ID" in os.environ
    if elastic:
        die_with_parent(os.getppid())  # for plain torchrun; our own workers have done it already
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    # The pod's name, since a replaced node is a new pod. Under plain torchrun, the agent's process id.
    node = os.environ.get("POD_NAME") or (f"{socket.gethostname()}-{os.getppid()}" if elastic else "single")
    where = place(device)
    backend = devices.backend(where)
    if size > 1:
        timeout = datetime.timedelta(seconds=timeout_seconds)
        try:
            store = _meet(rank, size, timeout_seconds, called)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        except RuntimeError as error:  # a peer died before it joined
            if isinstance(error, PeerLost):
                raise
            # torch names groups by number, and members find each other by the name. Only a group that is left sets it back.
            dist.distributed_c10d._world.group_count = 0
            raise NotJoined(f"rank {rank} of {size} could not join its peers: {error}") from error
    world = World(rank, size, local_rank, node, where, elastic, called, timeout_seconds)
    if size > 1 and devices.queues(where):
        world._collective(lambda: cast(Any, devices.Connecting(where)), where)
    return world


def _meet(rank: int, size: int, seconds: float, called: Callable[[], bool]) -> dist.Store:
    """Wait until all ranks are at the store of the new group, and return it. Making the group then takes no time."""
    deadline = time.monotonic() + seconds
    at = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store, there = None, 0
    while there < size:
        if called():
            raise PeerLost(f"rank {rank} of {size} is called to another world before all have come to this one")
        if time.monotonic() > deadline:
            raise NotJoined(f"rank {rank} of {size} could not join its peers: {size - there} of them do not come")
        if store is None:
            if rank and not _listens(at):
                time.sleep(LOOK_SECONDS)
                continue
            try:
                store = dist.TCPStore(*at, size, rank == 0, MEET_TIMEOUT, wait_for_workers=False)
            except dist.DistNetworkError:  # rank 0 is not there yet
                if rank == 0:
                    raise
                continue
            store.set_timeout(datetime.timedelta(seconds=seconds))
            store.add("there", 1)
        there = store.add("there", 0)
        if there < size:
            time.sleep(LOOK_SECONDS)
    assert store is not None
    return store


def _listens(address: tuple[str, int]) -> bool:
    """Whether rank 0's store is there. A client of torch's that comes too early looks again only after up to 0.7 s."""
    try:
        socket.create_connection(address, timeout=MEET_TIMEOUT.total_seconds()).close()
    except OSError:
        return False
    return True


def leave(lost_on: torch.device | None = None) -> bool:
    """Leave the group, whatever state it is in. Returns whether that was done in time (LEAVE_SECONDS).

    Peers that still wait for this worker see its connections close, and leave as well.

    Args:
        lost_on: this worker's device, if a peer was lost and collectives may stand still there: they are aborted.
    """
    if not dist.is_initialized():
        return True
    left, failed = threading.Event(), list[RuntimeError]()

    def destroy() -> None:
        group = dist.group.WORLD  # which closes its connections when nobody refers to it any more
        try:
            if lost_on is None:
                dist.destroy_process_group()
            else:
                devices.abort(lost_on)
        except RuntimeError as error:
            failed.append(error)
        left.set()
        del group

    leaving = threading.Thread(target=destroy, daemon=True)
    leaving.start()
    left.wait(LEAVE_SECONDS)
    # Longer only where a collective was given up: gloo's threads have to end first. The group is of no use to anybody then.
    leaving.join(CLOSE_SECONDS)
    if failed:
        print(f"warning: a group could not be left: {failed[0]}", file=sys.stderr, flush=True)
    return left.is_set() and not failed


class Signals:
    """The signals that this worker got. They are checked once in each step.

    Our agent (launch.py) sends SIGTERM to restart its workers after a membership change. If the
    node has to leave, it sends SIGUSR1 first. Without our agent, SIGTERM, Ctrl-C and a terminal
    that closes (SIGHUP) may mean leaving for good. A second Ctrl-C stops at once, but not under our
    agent: there, one key press reaches a worker twice (from the terminal and through its client).
    """

    def __init__(self) -> None:
        self.stop = False
        self.leave = False
        """Whether this node may leave, so that its state has to be saved on storage."""
        self.released = False
        """Whether no other worker will be started in its place."""
        self.number = 0
        self._since = 0.0
        self.told_apart = "DLROVER_MASTER_ADDR" in os.environ
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._asked)

    @property
    def waited(self) -> float:
        """Seconds since the first signal; 0 if there was none."""
        return time.monotonic() - self._since if self.stop else 0.0

    def _asked(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT and self.stop and not self.told_apart:
            raise KeyboardInterrupt
        self._since = self._since or time.monotonic()
        self.stop, self.number = True, number
        self.leave = self.leave or number != signal.SIGTERM or not self.told_apart
        self.released = self.released or number == signal.SIGUSR1 or not self.told_apart
