"""A job on virtual time: the real leases, rendezvous and scaling decision; nodes, workers and messages are simulated.

What is real: `Lease`, `Leases`, `wait_for_members` and `Scaling` of elastic_gpt.nodes, DLRover's rendezvous manager and its
key-value store. What is a model: the agent's side of a rendezvous; workers, who commit a step when all ranks of their world
have done it; DLRover's records of nodes; pods, and the network.

    Job ── clock, random, ledger            what nobody can lose
     ├── Master                             may be killed, and started anew with nothing but what it is told
     └── Node ── lease, agent, worker       may be killed, stopped, cut off, asked to leave
          └── Group                         of the workers that were given one world
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import random
from collections.abc import Callable, Generator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from dlrover.python.common.node import Node as DlroverNode
from dlrover.python.master.elastic_training import rdzv_manager
from dlrover.python.master.elastic_training.kv_store_service import KVStoreService
from dlrover.python.master.elastic_training.rdzv_manager import (
    ElasticTrainingRendezvousManager,
    NetworkCheckRendezvousManager,
    RendezvousManager,
)

from elastic_gpt.nodes import master as master_room
from elastic_gpt.nodes import rendezvous
from elastic_gpt.nodes.master import POLL_SECONDS, Scaling
from elastic_gpt.nodes.mend import ADDRESS_SECONDS, STEP_SECONDS
from elastic_gpt.nodes.rendezvous import (
    KEY,
    LEASE_SECONDS,
    LEAVES,
    PATIENCE_SECONDS,
    RECONNECT_SECONDS,
    RENEW_SECONDS,
    WAITS,
    Ask,
    Lease,
    Leases,
    wait_for_members,
)
from tests.simulation.virtual import Clock, Machine, Process

RPC_SECONDS = 5.0  # what DLRover's client waits for an answer, and between two tries
COLLECTIVE_SECONDS = 120.0  # elastic.timeout_seconds: a peer that says nothing, with connections that seem whole
START_SECONDS = 5.0  # a worker's or a pod's start takes up to this here
SLOWEST_STEP = 2.0
CALM_SECONDS = (  # from the last disturbance to a world of all who live, no wait beyond its bound
    LEASE_SECONDS + RECONNECT_SECONDS + ADDRESS_SECONDS + 2 * RPC_SECONDS + 3 * START_SECONDS + 3 * SLOWEST_STEP
    + 2 * POLL_SECONDS
)  # fmt: skip
SNAPSHOT_STEPS, CHECKPOINT_STEPS = 5, 20

State = tuple[int, int]  # the step that it has come to, and the life that made it
NOTHING: State = (-1, -1)


MENDED = {  # methods of DLRover's, by the class that has them: wait_for_members replaces some
    (owner, name): getattr(owner, name)
    for owner, name in [
        (KVStoreService, "set"),
        (RendezvousManager, "remove_alive_node"),
        (RendezvousManager, "join_rendezvous"),
        (RendezvousManager, "_check_rdzv_completed"),
        (RendezvousManager, "num_nodes_waiting"),
        (ElasticTrainingRendezvousManager, "get_comm_world"),
        (NetworkCheckRendezvousManager, "get_comm_world"),
    ]
}


class Violation(AssertionError):
    """A property does not hold."""


class Unreachable(Exception):
    """A request to the master was not answered."""


@dataclasses.dataclass
class Record:
    """As much of DLRover's record of a node as the scaling decision reads."""

    id: int
    rank_index: int
    status: str = "Initial"
    relaunchable: bool = True

    @property
    def name(self) -> str:
        return f"node-{self.id}"

    def update_status(self, status: str) -> None:
        self.status = status


@contextlib.contextmanager
def virtual_time(clock: Clock) -> Iterator[None]:
    """The rooms under test, ours and DLRover's, have the time of `clock`; and DLRover's classes are as they were at the end."""
    time = SimpleNamespace(time=lambda: clock.wall + clock.now, monotonic=lambda: clock.now)
    silent = logging.getLogger("simulation")
    silent.disabled = True
    nobody = SimpleNamespace(report_rdzv_node_join=lambda *_, **__: None, report_rdzv_complete=lambda *_, **__: None)
    with pytest.MonkeyPatch.context() as patch:
        for room in (rendezvous, master_room, rdzv_manager):
            patch.setattr(room, "time", time)
        patch.setattr(master_room, "print", lambda *_, **__: None, raising=False)
        patch.setattr(rdzv_manager, "logger", silent)
        patch.setattr(rdzv_manager, "get_event_reporter", lambda: nobody)
        patch.setattr(RendezvousManager, "new_rdzv_evt", lambda _: None)
        for owner, name in MENDED:
            patch.setattr(owner, name, getattr(owner, name))
        yield


class Group:
    """The workers of the nodes that were given one world: they meet at one address, and commit together."""

    def __init__(self, job: "Job", address: str, world: list[int]) -> None:
        self.job, self.address, self.world = job, address, world
        self.there: dict[int, Node] = {}  # by rank
        self.begun = self.over = self.leaving = False
        self.ends = 0.0  # when the step in flight is done
        self.step = self.life = self.start = -1

    def __str__(self) -> str:
        return f"world {self.address} of {self.world}"

    @property
    def state(self) -> State:
        return self.step, self.life

    def join(self, node: "Node", rank: int, world: list[int]) -> None:
        if world != self.world or self.there.get(rank, node) is not node:
            raise Violation(f"node {node.id} is rank {rank} of {world} in {self}, where {self.there.get(rank)} is")
        # A peer may never come, or nobody keep the store any more: the worker waits until it is called, or gives up.
        self.job.clock.after(COLLECTIVE_SECONDS, lambda: None if self.begun else node.give_up(self)())
        if self.over:
            return
        self.there[rank] = node
        if len(self.there) == len(self.world):
            self.job.clock.after(self.job.random.uniform(0.01, 0.3), self.begin)

    def begin(self) -> None:
        """All are there: a life of the run begins, with the newest state that one of them or the storage has."""
        if self.over:
            return
        self.begun = True
        states = [state for node in self.there.values() for state in (node.held, node.snapshot)]
        self.step, _ = max(state for state in [*states, self.job.storage] if self.job.is_kept(state))
        self.job.begin(self)
        for node in self.there.values():
            node.held = node.snapshot = self.state
        self.plan_step()

    def plan_step(self) -> None:
        seconds = self.job.step_seconds() + sum(node.slow.pop() if node.slow else 0.0 for node in self.there.values())
        self.ends = self.job.clock.now + seconds
        self.job.clock.after(seconds, self.end_step)

    def end_step(self) -> None:
        """All have done it, or none: a rank that stands still has the others wait."""
        if self.over:
            return
        now = self.job.clock.now
        if (until := max(node.still_until for node in self.there.values())) > now:
            self.job.clock.after(until - now, self.end_step)
            return
        if not all(node.alive for node in self.there.values()):  # a machine that vanished: the sum waits for it
            return
        self.step += 1
        for node in self.there.values():
            node.held = self.state
            if self.step % SNAPSHOT_STEPS == 0:
                node.snapshot = self.state
        if not self.job.commit(self):
            self.break_up()
            return
        if self.step % CHECKPOINT_STEPS == 0:
            self.job.storage = self.state
        if self.leaving:
            if any(node.leaves for node in self.there.values()):
                self.job.storage = self.state
            self.break_up()
        else:
            self.plan_step()

    def call(self) -> None:
        """One of them is called: all come out after the step in flight, or at once where they have not met."""
        self.leaving = True

    def break_up(self, without: "Node | None" = None) -> None:
        """The group is no more; those of its workers that live wait for another world, with what they hold."""
        self.over = True
        for node in self.there.values():
            if node is not without and node.alive:
                node.leave_group()

    def lose(self, node: "Node", silently: bool) -> None:
        """A worker has gone. Silently: its machine vanished, and nobody closes its connections."""
        if self.over:
            return
        if not self.begun:  # who waits in the store hears nothing of that, and gives up later
            self.over = True
        elif silently:
            self.job.clock.after(COLLECTIVE_SECONDS, self.break_up)
        else:
            self.break_up(without=node)


class VirtualLease(Lease):
    """The real one, whose thread is a process of the simulation."""

    def __init__(self, report: Callable[[str, bytes], Any], node: int) -> None:
        super().__init__(report, node)
        self._thread = SimpleNamespace(is_alive=lambda: True)  # type: ignore[assignment]

    @property
    def word(self) -> bytes:
        return self._word


class Node(Machine):
    """A node: its agent, the lease that the agent holds, and its worker."""

    def __init__(self, job: "Job", number: int, rank: int) -> None:
        super().__init__(job.clock)
        self.job, self.id, self.rank = job, number, rank
        self.cut_until = 0.0  # no message between this node and the master passes
        self.stuck_until = 0.0  # the agent does nothing, though its lease's thread lives
        self.blocked = 0.0  # seconds that the last report took
        self.lease = VirtualLease(self.report, number)
        self.leaves = False
        self.up = self.waits = False  # the worker: it is started; it waits for a world
        self.held = self.snapshot = NOTHING  # the state in the worker, and in shared memory
        self.group: Group | None = None
        self.slow: list[float] = []  # seconds by which its next steps are slower
        self.start(self.agent(), held_up=lambda: self.stuck_until)
        self.start(self.renew())

    def __repr__(self) -> str:
        return f"node {self.id}"

    # --- what becomes of it

    def kill(self, silently: bool = False) -> None:
        self.alive = False
        self.held = self.snapshot = NOTHING
        if self.group:
            self.group.lose(self, silently)

    def kill_worker(self) -> None:
        group, self.group = self.group, None
        self.up = self.waits = False
        self.held = NOTHING
        if group:
            group.lose(self, silently=False)

    def leave_group(self) -> None:
        self.group, self.waits = None, True
        self.snapshot = max(self.snapshot, self.held)

    def give_up(self, group: Group) -> Callable[[], None]:
        """What a worker does that has waited in vain for its peers: it waits for another world."""

        def end() -> None:
            if self.alive and self.group is group:
                group.over = True
                self.leave_group()

        return end

    def ask_to_leave(self) -> None:
        """SIGTERM: the step in flight is done, the state saved, and the node goes."""
        if not self.leaves:
            self.leaves = True
            self.lease.release()
            self.lease.renew()  # its thread is woken
            self.start(self.go())

    def can_save(self) -> bool:
        """Whether what it holds need not be lost: a node that leaves saves it, unless it waits for a machine that vanished."""
        trains = self.group and self.group.begun
        return not self.leaves or not trains or all(node.alive for node in self.group.there.values())

    def go(self) -> Process:
        if self.group and self.group.begun:
            self.group.call()
        deadline = self.clock.now + STEP_SECONDS
        while self.group and self.group.begun and not self.group.over and self.clock.now < deadline:
            yield 0.1
        yield self.job.random.uniform(0.05, 0.5)
        in_step = self.group and self.group.begun and not self.group.over
        if not in_step and self.job.is_kept(self.held):
            self.job.storage = max(self.job.storage, self.held)
        self.lease.end()
        self.kill()
        self.job.ended(self)

    # --- messages

    def away(self) -> bool:
        return self.clock.now < self.cut_until or self.job.master is None

    def report(self, key: str, value: bytes) -> None:
        """As the agent's client reports a lease: one try; `blocked` is how long it takes."""
        out, back = self.job.delay(), self.job.delay()
        if self.job.master is None:
            self.blocked = self.job.random.uniform(0.0, 1.0)  # refused, once gRPC has tried again
            raise Unreachable
        self.blocked = min(out + back, RPC_SECONDS)
        self.clock.after(out, lambda: None if self.away() else self.job.master.hear(self.id, key, value))
        if self.clock.now < self.cut_until or out + back > RPC_SECONDS:
            self.blocked = RPC_SECONDS
            raise Unreachable

    def once(self, ask: Callable[["Master"], Any]) -> Generator[float, None, Any]:
        """One request. It may reach the master after nobody waits for its answer any more, and the answer may be lost."""
        out, back = self.job.delay(), self.job.delay()
        if self.job.master is None:
            yield self.job.random.uniform(0.0, 1.0)
            raise Unreachable
        answers: list[Any] = []
        self.clock.after(out, lambda: None if self.away() else answers.append(ask(self.job.master)))
        if out + back > RPC_SECONDS or self.clock.now < self.cut_until:
            yield RPC_SECONDS
            raise Unreachable
        yield out + back
        if not answers or self.away():
            raise Unreachable
        return answers[0]

    def ask(self, ask: Callable[["Master"], Any]) -> Generator[float, None, Any]:
        """As DLRover's client does: again after five seconds, and again."""
        while True:
            try:
                return (yield from self.once(ask))
            except Unreachable:
                yield RPC_SECONDS

    # --- the lease's thread

    def renew(self) -> Process:
        while True:
            yield RENEW_SECONDS
            self.blocked = 0.0
            self.lease.renew()
            yield self.blocked

    def say(self, word: Callable[[], None]) -> Process:
        self.blocked = 0.0
        word()
        yield self.blocked

    # --- the agent: mend.keep_the_living, and DLRover's _invoke_run around it

    def agent(self) -> Process:
        yield from self.start_worker()
        while not self.leaves:
            rank, world, address = yield from self.rendezvous()
            if self.leaves:
                return
            if not self.up:
                yield from self.start_worker(in_world=True)
            self.waits, self.group = False, self.job.group(address, world)
            self.group.join(self, rank, world)
            yield from self.watch()

    def start_worker(self, in_world: bool = False) -> Process:
        if not in_world:
            yield from self.say(self.lease.pause)
        yield self.job.random.uniform(0.1, START_SECONDS)
        self.up = self.waits = True

    def watch(self) -> Process:
        """Until this node has to ask for a world; its worker is up and waits then."""
        while not self.leaves:
            yield self.job.poll
            if not self.up:
                yield from self.start_worker()
                return
            if self.waits:
                return
            try:
                others = yield from self.once(lambda master: master.manager.num_nodes_waiting())
            except Unreachable:
                continue
            if others:
                yield from self.come()
                return

    def come(self) -> Process:
        """Have the worker come out of its world: after its step, or by its end."""
        deadline = self.clock.now + STEP_SECONDS
        while self.up and not self.waits:
            if self.group and not self.group.begun:
                self.group.over = True
                self.leave_group()
                break
            if self.group:
                self.group.call()
            if self.clock.now > deadline:
                self.kill_worker()
                break
            yield self.job.poll / 2
        if not self.up:
            yield from self.start_worker()

    def rendezvous(self) -> Generator[float, None, tuple[int, list[int], str]]:
        """MasterRendezvousHandler.next_rendezvous and ElasticTrainingAgent._rendezvous, as mended."""
        number, rank, least, most = self.id, self.rank, self.job.least, self.job.most
        while True:
            yield from self.say(lambda: self.lease.ask(Ask("elastic-training", rank, 1, least, most, 1)))
            yield from self.ask(lambda master: master.manager.update_rdzv_params(least, most, 1, 1))
            yield from self.ask(lambda master: master.come(number, rank))
            self.job.say(f"{self} waits")
            while True:
                turn, world = yield from self.ask(lambda master: master.world(rank))
                if rank in world:
                    break
                yield self.job.poll
            yield from self.say(self.lease.hold)
            address = yield from self.address(turn, first=next(iter(world)) == rank)
            if address:
                last, members = yield from self.ask(lambda master: master.world(rank))
                if turn == last and rank in members:
                    return list(world).index(rank), list(world.values()), address
            self.job.say(f"{self} {'is late for its world' if address else 'has no word of rank 0'}")

    def address(self, turn: int, *, first: bool) -> Generator[float, None, str]:
        """Where rank 0 of this round's world is met; nothing if it does not tell in time."""
        key, mine = f"elastic-training/{turn}/MASTER_ADDR", f"{self.id}.{next(self.job.ports)}".encode()
        if first:
            yield from self.ask(lambda master: master.store.set(key, mine))
        deadline = self.clock.now + ADDRESS_SECONDS
        while self.clock.now < deadline:
            if found := (yield from self.ask(lambda master: master.store.get(key))):
                return str(found, "ascii")
            yield self.job.poll / 2
        return ""


class Master(Machine):
    """DLRover's rendezvous and store with the leases, and our scaling."""

    def __init__(self, job: "Job", restarted: bool) -> None:
        super().__init__(job.clock)
        self.job = job
        self.leases = Leases(clock=lambda: job.clock.now)
        self.began = job.clock.now
        self.heard: dict[int, tuple[float, bytes]] = {}  # when each node was heard last, and what it said
        self.numbers: dict[int, int] = {}  # of the last of a node's words
        self.told_gone: set[int] = set()
        self.waiting_since: float | None = None
        for (owner, name), method in MENDED.items():  # a new process would have them as DLRover wrote them
            setattr(owner, name, method)
        job.patch(self.leases, restarted)
        self.store, self.manager = KVStoreService(), ElasticTrainingRendezvousManager()
        self.check = NetworkCheckRendezvousManager()  # which is always there
        self.restarted = restarted
        self.records = {node.id: Record(node.id, node.rank, "Running") for node in job.nodes.values() if node.alive}
        for record in job.pods.values():  # they were asked for, and have not come yet
            self.records.setdefault(record.id, dataclasses.replace(record, status="Pending"))
        if restarted:
            lacking = set(range(job.wanted)) - {record.rank_index for record in self.records.values()}
            for rank in sorted(lacking):  # DLRover plans all ranks and starts none where it finds nodes that run
                record = Record(next(job.numbers), rank)
                self.records[record.id] = record
        self.scaling = VirtualScaling(self)
        self.start(self.scale())

    def hear(self, node: int, key: str, value: bytes) -> None:
        if key.startswith(KEY):
            number, _, word = value.partition(b" ")
            if int(number) >= self.numbers.get(node, 0):
                self.heard[node], self.numbers[node] = (self.job.clock.now, word), int(number)
        self.store.set(key, value)

    def come(self, node: int, rank: int) -> int:
        """A node asks for a world: where its lease was not heard yet, that is its first sign of life."""
        self.heard.setdefault(node, (self.job.clock.now, WAITS))
        return int(self.manager.join_rendezvous(node, rank, 1))

    def world(self, rank: int) -> tuple[int, dict[int, int]]:
        """The answer to get_comm_world: the round, and node ids by rank."""
        if self.check.num_nodes_waiting():
            raise Violation("an agent that asks for a world leaves for a network check, for which nobody waits")
        before = self.manager.get_rdzv_round()
        now = self.job.clock.now
        self.waiting_since = (self.waiting_since or now) if self.manager._waiting_nodes else None
        try:
            turn, _, nodes = self.manager.get_comm_world(rank)
        except StopIteration as error:  # what DLRover 0.6.1 does when it completes a rendezvous that nobody waits for
            raise Violation("a world of no node") from error
        world = {one: meta.node_id for one, meta in nodes.items()}
        if turn != before and world:
            self.job.say(f"round {turn}: {list(world.values())}")
            self.job.check_formed(self, list(world.values()))
        return turn, world

    def gone(self, node: int) -> None:
        self.told_gone.add(node)
        if self.job.pods_are_watched:
            self.manager.remove_alive_node(DlroverNode("worker", node))
        else:  # as the launcher of local nodes tells it
            self.leases.gone(node)

    # --- DLRover's job manager, as far as scaling sees it

    def scale(self) -> Process:
        while True:
            self.scaling.reconcile()
            yield POLL_SECONDS

    def end(self, number: int) -> None:
        """A pod has ended: DLRover replaces it where it may."""
        record = self.records.get(number)
        self.gone(number)
        if record and record.status != "Deleted":
            record.status = "Deleted"
            newer = any(one.rank_index == record.rank_index and one.id > number for one in self.records.values())
            if record.relaunchable and not newer:
                successor = Record(next(self.job.numbers), record.rank_index)
                self.records[successor.id] = successor
                self.job.start_pod(successor)


class VirtualScaling(Scaling):
    """The real one, upon records and pods of the simulation."""

    def __init__(self, master: Master) -> None:
        job = master.job
        arguments = ["elastic-gpt", "launch", f"--nnodes={job.least}:{job.most}"]
        worker = {"replicas": 0, "template": {"spec": {"containers": [{"args": arguments}]}}}
        spec = {"spec": {"replicaSpecs": {"worker": worker}}}

        def read(**_: str) -> dict[str, Any]:
            worker["replicas"] = job.wanted
            return spec

        def start(plan: Any) -> None:
            for record in plan.launch_nodes:
                master.records[record.id] = record
                job.start_pod(record)

        def remove(plan: Any) -> None:
            for record in plan.remove_nodes:
                job.remove_pod(record.id)

        manager = SimpleNamespace(
            pend_without_workers=lambda: False,
            _k8s_client=SimpleNamespace(get_custom_resource=read),
            _worker_manager=SimpleNamespace(_get_mutable_nodes=lambda: master.records),
            _job_context=SimpleNamespace(update_job_node=lambda _: None),
            _scaler=SimpleNamespace(scale=start, _remove_nodes=remove, _create_node_queue=[]),
        )
        super().__init__(manager, "simulated")
        self._job = job

    def _new_node(self, rank: int) -> Record:
        return Record(next(self._job.numbers), rank)


class Job:
    """One job, from its start until the simulation ends.

    Args:
        seed: of all that is left to chance.
        least, most: nodes of a world.
        wanted: nodes of the job at first.
        patch: how a master is made to wait for those who hold leases; a test puts an old fault back here.
        trace: keep what happens, for a person to read.
    """

    def __init__(
        self,
        seed: int,
        least: int,
        most: int,
        wanted: int,
        *,
        poll: float = 0.2,
        patch: Callable[..., None] | None = None,
        trace: bool = False,
    ) -> None:
        self.clock, self.random = Clock(), random.Random(seed)
        self.least, self.most, self.wanted, self.poll = least, most, wanted, poll
        wait = patch or wait_for_members
        self.patch = lambda leases, restarted: wait(leases, restarted=restarted)
        self.trace: list[str] | None = [] if trace else None
        self.nodes: dict[int, Node] = {}
        self.pods: dict[int, Record] = {}  # that have not come yet
        self.numbers, self.ports, self.groups = itertools.count(), itertools.count(1), dict[str, Group]()
        self.pods_are_watched = self.random.random() < 0.5
        self.loss = 0.0  # share of messages that come late, or too late
        self.step = 0.3
        # --- what the storage and the ledger keep
        self.storage: State = (0, -1)
        self.superseded = 0  # worlds that the ledger ended, since the leases did not prevent them
        self.lives: list[Group] = []
        self.committed = self.commits = 0
        # --- what is promised
        self.left_out: set[int] = set()  # nodes that the last world was rightly formed without, though they may live
        self.disturbed_until, self.deadline, self.settled = 0.0, CALM_SECONDS, False
        self.master: Master | None = None

    def begin_all(self) -> None:
        """Start the job, within `virtual_time`."""
        self.master = Master(self, restarted=False)

    def settle(self) -> None:
        """Let time pass until all is well again."""
        while not self.settled:
            self.clock.run(self.deadline, stop=lambda: self.settled)
            if self.clock.now >= self.deadline:
                break

    def say(self, what: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.clock.now:9.3f} s  {what}")

    def delay(self) -> float:
        """Seconds that a message takes; a late one may be too late for who waits for its answer."""
        if self.loss and self.random.random() < self.loss:
            return self.random.choice((0.3, 1.0, 3.0, 6.0, 9.0)) * self.random.random()
        return self.random.uniform(0.001, 0.02)

    def step_seconds(self) -> float:
        return self.random.uniform(0.5, 1.0) * self.step

    # --- pods

    def start_pod(self, record: Record) -> None:
        record.status, self.pods[record.id] = "Pending", record
        self.clock.after(self.random.uniform(0.1, START_SECONDS), lambda: self.pod_comes(record))

    def pod_comes(self, record: Record) -> None:
        if self.pods.pop(record.id, None) is None:  # it was taken away before
            return
        self.say(f"node {record.id} starts as rank {record.rank_index}")
        self.nodes[record.id] = Node(self, record.id, record.rank_index)
        if self.master and record.id in self.master.records:
            self.master.records[record.id].status = "Running"
        self.disturb(0.0)

    def remove_pod(self, number: int) -> None:
        self.say(f"node {number} is asked to leave")
        if self.pods.pop(number, None):
            self.tell_end(number)
        elif (node := self.nodes.get(number)) and node.alive:
            node.ask_to_leave()
        self.disturb(0.0)

    def ended(self, node: Node, after: float | None = None) -> None:
        """A node has gone; the master learns of it, if there is one, a little later."""
        self.say(f"{node} has ended")
        self.clock.after(self.random.uniform(0.01, 1.0) if after is None else after, lambda: self.tell_end(node.id))
        self.disturb(1.0 if after is None else after)

    def tell_end(self, number: int) -> None:
        if self.master:
            self.master.end(number)
        else:  # it finds no such pod
            self.clock.after(1.0, lambda: self.tell_end(number))

    # --- what is done to it

    def disturb(self, seconds: float, more: float = 0.0) -> None:
        """Something happens for so many seconds; all is well again in CALM_SECONDS after that, and some more."""
        self.disturbed_until = max(self.disturbed_until, self.clock.now + seconds)
        self.deadline = max(self.deadline, self.disturbed_until + more + CALM_SECONDS)
        self.settled = False
        due = self.deadline
        self.clock.after(due - self.clock.now, lambda: self.check_progress(due))

    def kill_master(self, seconds: float) -> None:
        if self.master is None:
            return
        self.say(f"the master is killed, for {seconds:.1f} s")
        self.master.alive, self.master = False, None

        def anew() -> None:
            self.say("a master is started")
            self.master = Master(self, restarted=any(node.alive for node in self.nodes.values()))
            self.disturb(0.0, master_room.LOST_SECONDS)

        self.clock.after(seconds, anew)
        self.disturb(seconds, master_room.LOST_SECONDS)

    def scale(self, wanted: int) -> None:
        self.say(f"{wanted} nodes are wanted")
        self.wanted = wanted
        self.disturb(0.0)

    def jump(self, seconds: float) -> None:
        """The master's wall clock is set."""
        self.say(f"the wall clock jumps by {seconds:.0f} s")
        self.clock.wall += seconds
        self.disturb(0.0)

    # --- worlds

    def group(self, address: str, world: list[int]) -> Group:
        return self.groups.setdefault(address, Group(self, address, world))

    def is_kept(self, state: State) -> bool:
        """Whether it is in the history of the run: no later life began before it."""
        step, life = state
        return step >= 0 and all(later.start >= step for later in self.lives[life + 1 :])

    def begin(self, group: Group) -> None:
        """A life begins, and the ledger says so: what an earlier world still does is not kept."""
        self.say(f"{group} begins at step {group.step}")
        others = [node for node in self.nodes.values() if node.alive and node not in group.there.values()]
        better = [node for node in others if node.held[0] > group.step and self.is_kept(node.held) and node.can_save()]
        if lost := [node for node in better if node.id not in self.left_out]:
            raise Violation(f"{group} begins at step {group.step}, and {lost} has step {lost[0].held[0]}")
        group.life, group.start = len(self.lives), group.step
        self.committed = group.step
        self.lives.append(group)

    def commit(self, group: Group) -> bool:
        """A step of all ranks of a world; the ledger refuses that of a world that was left out. Returns whether it counts."""
        if self.lives[-1] is not group:
            self.say(f"{group} is superseded")
            self.superseded += 1
            return False
        if group.step != self.committed + 1:
            raise Violation(f"{group} commits step {group.step} after {self.committed}")
        self.committed = group.step
        self.commits += 1
        if not self.settled and self.clock.now >= self.disturbed_until and self.is_whole(group):
            self.say(f"all is well at step {group.step}")
            self.settled = True
        return True

    def is_whole(self, group: Group) -> bool:
        """Whether all nodes that are wanted are in this world, and no others live."""
        living = [node for node in self.nodes.values() if node.alive]
        ranks = {node.rank for node in living}
        return ranks == set(range(self.wanted)) and {node.id for node in living} == set(group.world)

    # --- what has to hold

    def check_formed(self, master: Master, world: list[int]) -> None:
        """No world is formed beside one that may still commit, and none with a node that is known to be lost."""
        now = self.clock.now
        for number in world:
            at, word = master.heard.get(number, (-math.inf, b""))
            if not self.nodes[number].alive and (
                now - at >= LEASE_SECONDS or word in (b"", LEAVES) or number in master.told_gone
            ):
                raise Violation(f"a world of {world} is formed with node {number}, which is known to be lost")
        if len(world) < self.least:
            raise Violation(f"a world of {world} is formed, and the least is {self.least} nodes")
        self.left_out = set()
        for node in self.nodes.values():
            if not node.alive or node.id in world:
                continue
            at, word = master.heard.get(node.id, (-math.inf, b""))
            if master.restarted and now - master.began < RECONNECT_SECONDS and node.id not in master.heard:
                at, word = now, node.lease.word  # it has not had the time to find this master
            patient = master.waiting_since is not None and now - master.waiting_since >= PATIENCE_SECONDS
            if now - at >= LEASE_SECONDS or patient or node.id in master.told_gone:
                self.left_out.add(node.id)
            elif word not in (b"", LEAVES) and node.held != NOTHING:
                raise Violation(f"a world of {world} is formed without {node}, which holds a lease")

    def check_progress(self, due: float) -> None:
        """No wait is longer than its bound."""
        if due < self.deadline or self.settled or self.wanted < self.least:
            return
        living = {node.id: (node.up, node.waits, node.lease.word) for node in self.nodes.values() if node.alive}
        raise Violation(
            f"no world of all {self.wanted} nodes {self.clock.now - self.disturbed_until:.0f} s on: {living}"
        )
