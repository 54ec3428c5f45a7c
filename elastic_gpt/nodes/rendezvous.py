"""One world at a time: each node in a world holds a lease at the master, and no new world is formed without these nodes.

DLRover closes a rendezvous some seconds after the last node came, even if nodes that are training
have not noticed it. A node that notices late (a long step, a busy machine, a master that was away)
would be left out. It would train on beside the new world, into the same run directory. So each
agent renews a lease in the master's key-value store, and the master waits for all holders until
they come, say that they leave, are known to be gone, or are silent for LEASE_SECONDS. It also
leaves out a node that came but has been gone or silent since.

That prevents two worlds at once. Should there be two all the same, `Ledger.superseded` ends the
older one.

In a pod, the agent sends the progress of training with its lease (contract.py), and the master
writes it to its log.
"""

import atexit
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from elastic_gpt.contract import Progress, progress_file

PROGRESS_KEY = "elastic-gpt/progress"
KEY = "elastic-gpt/lease/"
WAITS, HELD, LEAVES = b"waits", b"held", b"leaves"  # words of a lease, after a number; after WAITS comes an Ask
LEASE_SECONDS = 5.0  # a machine that vanished without a word costs a membership change this much
RENEW_SECONDS = 0.5
PATIENCE_SECONDS = 60.0  # for a node that lives but does not come; torchelastic gives its workers 30 s to end
RECONNECT_SECONDS = 3.0  # in which all nodes of a world find a restarted master
PROGRESS_SECONDS = 5.0  # between two lines of progress in the master's log, at least


class Ask(NamedTuple):
    """What a node that waits for a world has told the master; a master that was started anew learns it from its lease."""

    rendezvous: str
    """DLRover's name of it."""
    rank: int
    workers: int
    least: int
    """Nodes of a world; --nnodes."""
    most: int
    last_call: int
    """Seconds in which others may come to a first world."""


class Lease:
    """What an agent tells the master, from its first request for a world on.

    Args:
        report: writes (key, value) to the master's key-value store; may raise while the master is away.
        node: id of this node.
    """

    def __init__(self, report: Callable[[str, bytes], Any], node: int) -> None:
        self._report, self._key = report, f"{KEY}{node}"
        self._progress = progress_file()  # None outside of pods
        self._progress_told = b""
        self._word = b""  # what this node is: nothing, waiting for a world, or in one
        self._numbers, self._lock = itertools.count(1), threading.Lock()
        self._leaves = self._ended = False
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def ask(self, ask: Ask) -> None:
        """From now on this node waits for a world; the one that it may have been in is over for it."""
        self._say(b" ".join([WAITS, *(str(word).encode() for word in ask)]))

    def hold(self) -> None:
        """From now on this node is in a world."""
        self._say(HELD)  # before a worker trains, so that there is no gap

    def pause(self) -> None:
        """This node is in no world and asks for none yet, so that others do not wait while its workers start."""
        self._say(b"")

    def _say(self, word: bytes) -> None:
        if self._leaves:
            return
        self._tell_word(word)
        if not self._thread.is_alive():
            self._thread.start()
            atexit.register(self._tell_progress)  # its last word may be younger than the last renewal
            atexit.register(self.end)

    def release(self) -> None:
        """This node leaves, once the step in flight is done and saved. Safe in a signal handler."""
        self._leaves = True
        self._changed.set()

    def end(self) -> None:
        """This node has left, if it was to leave."""
        if self._leaves and not self._ended:
            self._ended = True
            self._tell_word(b"")

    def _renew(self) -> None:
        while not self._ended:
            self._changed.wait(RENEW_SECONDS)
            self._changed.clear()
            self.renew()

    def renew(self) -> None:
        """Say once more what this node is. Called by a thread of this lease's own."""
        if self._word or self._leaves:
            self._tell_word()
        self._tell_progress()

    def _tell_word(self, word: bytes | None = None) -> None:
        """Say what this node is, or has been until now; with a number, for a late message is not to undo a newer one."""
        with self._lock:
            if word is not None:
                self._word = word
            elif self._leaves:
                self._word = b"" if self._ended else LEAVES
            value = b"%d %s" % (next(self._numbers), self._word)
        self._tell(self._key, value)

    def _tell_progress(self) -> None:
        try:
            told = self._progress.read_bytes() if self._progress else b""
        except OSError:  # training has not begun
            return
        if told != self._progress_told and self._tell(PROGRESS_KEY, told):
            self._progress_told = told

    def _tell(self, key: str, value: bytes) -> bool:
        try:
            self._report(key, value)
        except Exception:  # the master is away; the next one will be told
            return False
        return True


class Leases:
    """What the master knows of the leases. Times are seconds on a monotonic clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._renewed: dict[int, float] = {}
        self._members: set[int] = set()  # those that have been in a world, and were never without a lease since
        self._numbers: dict[int, int] = {}  # of each node's last word
        self._asks: dict[int, Ask] = {}  # of those that wait for a world
        self._leaving: set[int] = set()
        self._gone: set[int] = set()
        self.since: float | None = None
        """When this master first heard of a lease; None: not yet."""
        self._progress = Progress()
        self._written = -PROGRESS_SECONDS  # when progress was last written

    def told(self, key: str, value: bytes) -> bool:
        """Take a report of an agent. Returns whether it was about a lease or progress."""
        if key == PROGRESS_KEY:
            self._write(Progress.from_line(value.decode(errors="replace")))
            return True
        if not key.startswith(KEY):
            return False
        node = int(key.removeprefix(KEY))
        number, _, value = value.partition(b" ")
        if int(number) < self._numbers.get(node, 0):
            return True  # a late one
        self._numbers[node] = int(number)
        self._renewed[node] = self._clock() if value else -math.inf  # one that leaves may have been waiting for a world
        self._asks.pop(node, None)
        self._leaving.discard(node)
        if value:
            self.since = self.since or self._renewed[node]
            if value == HELD:
                self._members.add(node)
            elif value == LEAVES:
                self._leaving.add(node)
            else:
                _, rendezvous, *numbers = value.decode().split()
                self._asks[node] = Ask(rendezvous, *map(int, numbers))
        else:
            self._members.discard(node)
        return True

    def _write(self, progress: Progress | None) -> None:
        """Write new progress to the master's log: the end and a new world at once, other steps now and then."""
        if progress is None or progress.time <= self._progress.time:
            return
        now = self._clock()
        soon = progress.step < progress.steps and progress.workers == self._progress.workers
        if soon and now - self._written < PROGRESS_SECONDS:
            return
        self._progress, self._written = progress, now
        print(progress.to_line(), flush=True)

    def came(self, node: int) -> None:
        """The node has asked the master itself, which is a sign of life: its first one, where its lease was not heard yet."""
        self._renewed.setdefault(node, self._clock())

    def gone(self, node: int) -> None:
        """The node has gone or is going. Its id is never used again."""
        self._gone.add(node)

    def are_gone(self, nodes: Iterable[int] | None = None) -> int:
        """How many of these are known to have gone; None: of all that this master has heard."""
        return len(self._gone.intersection(self._renewed if nodes is None else nodes))

    def held(self) -> set[int]:
        """Ids of the nodes that are in a world, or want to be."""
        return self._heard() - self._leaving

    def leaving(self) -> set[int]:
        """Ids of the nodes that want to be in no other world, and may still do and save a step of theirs."""
        return self._heard() & self._leaving

    def _heard(self) -> set[int]:
        now = self._clock()
        return {node for node, at in list(self._renewed.items()) if now - at < LEASE_SECONDS} - self._gone

    def members(self) -> set[int]:
        """Ids of the nodes that are in a world, or were in the last one and want to be in the next."""
        return self._members & self.held()

    def asks(self, rendezvous: str) -> dict[int, Ask]:
        """By their ids, what those nodes ask that wait for a world of this rendezvous."""
        held = self.held()
        return {node: ask for node, ask in list(self._asks.items()) if ask.rendezvous == rendezvous and node in held}

    def lost(self) -> set[int]:
        """Ids of the nodes that have gone, have given up their lease, or have not renewed it."""
        return (self._renewed.keys() - self.held()) | self._gone


def wait_for_members(leases: Leases, *, restarted: bool) -> None:
    """Make DLRover's rendezvous, in the master's process, wait for the holders of `leases`.

    Args:
        restarted: whether there may be a world that this master does not know yet.
    """
    from dlrover.python.master.elastic_training import kv_store_service, rdzv_manager

    found: list[float] = []  # when the first node asked for a world
    missing: dict[int, float] = {}  # since when those who wait have waited for a node
    seen: dict[Any, set[int]] = {}  # of each rendezvous the ranks of the nodes that have seen its last world
    last: dict[Any, set[int]] = {}  # ids of the nodes of that world, even after somebody has asked for the next one
    known: dict[Any, set[int]] = {}  # who held a lease when that was formed: in it, or waited for in vain
    put = kv_store_service.KVStoreService.set
    remove = rdzv_manager.RendezvousManager.remove_alive_node
    join = rdzv_manager.RendezvousManager.join_rendezvous
    check = rdzv_manager.RendezvousManager._check_rdzv_completed
    count = rdzv_manager.RendezvousManager.num_nodes_waiting

    def take_up(manager: Any) -> None:
        """Have those wait who say that they do: an agent asks once only, and its place may be lost.

        So it is where another node came before this one had seen its world, where the master was started anew, and where
        this node was silent for a while.
        """
        with manager._lock:
            there = {node.node_id for node in [*manager._waiting_nodes.values(), *manager._rdzv_nodes.values()]}
            for node, ask in leases.asks(manager._name).items():
                # Also for one that is there: it may have told these to the master before, and come to this one.
                manager.update_rdzv_params(ask.least, ask.most, ask.last_call, 1)
                if node not in there:
                    manager.join_rendezvous(node, ask.rank, ask.workers)

    def set_value(store: Any, key: str, value: bytes) -> None:
        if not leases.told(key, value):
            put(store, key, value)
        elif WAITS in value:
            for manager in list(seen):  # agents are heard in several threads
                take_up(manager)

    def remove_alive_node(manager: Any, node: Any) -> None:
        leases.gone(node.id)
        remove(manager, node)

    def join_rendezvous(manager: Any, node: int, rank: int, workers: int, ip: str = "") -> Any:
        leases.came(node)
        with manager._lock:
            if not manager._waiting_nodes:
                missing.clear()
            there = manager._rdzv_nodes.get(rank)
            if there and there.node_id == node and rank not in seen.get(manager, ()):
                return (
                    manager._rdzv_round
                )  # it was taken up before it asked: to begin anew would take the world from all
            return join(manager, node, rank, workers, ip)

    def see(get_comm_world: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
        def get(manager: Any, rank: int) -> Any:
            with manager._lock:
                answer = get_comm_world(manager, rank)
                if rank in answer[2]:
                    seen.setdefault(manager, set()).add(rank)
                return answer

        return get

    def check_completed(manager: Any) -> bool:
        if manager not in seen:
            seen[manager] = set()
            if (
                restarted
            ):  # not the rounds of the master before: an address that was meant for one of those may come here
                manager._rdzv_round = 2 * int(time.time())
        now = time.monotonic()
        if not found:
            found.append(now)
        everybody = 0 < manager.get_max_nodes() <= len(leases.held())  # as many as a world may have
        if restarted and not everybody and now < (leases.since or found[0]) + RECONNECT_SECONDS:
            return False
        lost = leases.lost()
        for rank, node in list(manager._waiting_nodes.items()):
            if node.node_id in lost:
                del manager._waiting_nodes[rank]
        take_up(manager)
        waiting = {node.node_id for node in manager._waiting_nodes.values()}
        if not waiting:  # DLRover would form a world of none, before it knows how many are needed
            return False
        absent = leases.held() - waiting
        if (
            not leases.members() & waiting
        ):  # else one has come who was in the world of those who leave, and has all they have
            absent |= leases.leaving()
        for node in missing.keys() - absent:
            del missing[node]
        missing.update(dict.fromkeys(absent - missing.keys(), now))
        if any(now - since < PATIENCE_SECONDS for since in missing.values()):
            return False
        manager._lastcall_time = min(
            manager._lastcall_time, time.time()
        )  # a clock that was set back is no reason to wait
        if leases.members() and leases.held() <= waiting:  # nobody else is worth a last call
            manager._lastcall_time = 0
        completed = bool(check(manager))
        if completed:
            seen[manager].clear()
            last[manager] = {node.node_id for node in manager._rdzv_nodes.values()}
            known[manager] = leases.held()
        return completed

    def num_nodes_waiting(manager: Any) -> int:
        """More than none: all come for another world.

        So they do for one of theirs that has gone before they met, and for one that was silent and is back, in a world of old.
        Who is in a world that the master before has formed is not known: anybody that has gone may be awaited in it.
        """
        trains = isinstance(manager, rdzv_manager.ElasticTrainingRendezvousManager)  # the other one checks networks
        with manager._lock:
            world = {node.node_id for node in manager._rdzv_nodes.values()}
            back = leases.members() - world - known.get(manager, set()) if world else set()
            return int(count(manager)) + leases.are_gone(last.get(manager, None if trains else ())) + len(back)

    kv_store_service.KVStoreService.set = set_value
    rdzv_manager.RendezvousManager.remove_alive_node = remove_alive_node
    rdzv_manager.RendezvousManager.join_rendezvous = join_rendezvous
    rdzv_manager.RendezvousManager._check_rdzv_completed = check_completed
    rdzv_manager.RendezvousManager.num_nodes_waiting = num_nodes_waiting
    for kind in (rdzv_manager.ElasticTrainingRendezvousManager, rdzv_manager.NetworkCheckRendezvousManager):
        kind.get_comm_world = see(kind.get_comm_world)
