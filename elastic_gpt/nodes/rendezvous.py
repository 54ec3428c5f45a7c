"""One world at a time: a node that trains holds a lease at the master, and no world is formed without those that do.

DLRover closes a rendezvous some seconds after the last node came, whether or not the nodes that are
training have noticed it. One that notices late (a long step, a busy machine, a master that was
away) would be left out and train on beside the new world, into the same run directory. So each
agent renews a lease in the master's key-value store, and here the master waits for whoever holds
one, until it comes, says that it leaves, is known to be gone, or is silent for LEASE_SECONDS. Nor
does it form a world with a node that came, and has been gone or silent since.

This is what keeps two worlds from being made; `Ledger.superseded` ends one that was made all the
same.

In a pod the agent tells with its lease how far training is (contract.py), and the master writes
that to its log.
"""

import atexit
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from elastic_gpt.contract import Progress, progress_file

PROGRESS_KEY = "elastic-gpt/progress"
KEY = "elastic-gpt/lease/"
WAITS, HELD = b"waits", b"held"  # values of a lease
LEASE_SECONDS = 5.0  # a machine that vanished without a word costs a membership change this much
RENEW_SECONDS = 0.5
PATIENCE_SECONDS = 60.0  # for a node that is alive and does not come; torchelastic gives its workers 30 s to end
RECONNECT_SECONDS = 3.0  # between the first and the last node of a world to find a master that was started anew
PROGRESS_SECONDS = 5.0  # between two lines of progress in the master's log, at least


class Lease:
    """What an agent tells the master, from when it first asks for a world.

    Args:
        report: (key, value) to the master's key-value store; may raise while the master is away.
        node: this node's id.
    """

    def __init__(self, report: Callable[[str, bytes], Any], node: int) -> None:
        self._report, self._key = report, f"{KEY}{node}"
        self._progress = progress_file()  # None outside of pods
        self._progress_told = b""
        self._word = b""  # what this node is: nothing, waiting for a world, or in one
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def ask(self) -> None:
        """From now on this node waits for a world; the one that it may have been in is over for it."""
        self._say(WAITS)

    def hold(self) -> None:
        """From now on this node is in a world."""
        self._say(HELD)  # before a worker trains, so that no gap is left

    def pause(self) -> None:
        """This node is in no world and asks for none yet: the others need not wait for its workers to start."""
        self._say(b"")

    def _say(self, word: bytes) -> None:
        if self._released.is_set():
            return
        self._word = word
        self._tell(self._key, word)
        if not self._thread.is_alive():
            self._thread.start()
            atexit.register(self._tell_progress)  # its last word may be younger than the last renewal

    def release(self) -> None:
        """This node leaves: nobody has to wait for it. Safe in a signal handler."""
        self._released.set()

    def _renew(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            if self._word:
                self._tell(self._key, self._word)
            self._tell_progress()
        self._tell(self._key, b"")

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
        except Exception:  # the master is away; the next one is told
            return False
        return True


class Leases:
    """What the master knows of them. Times are of a monotonic clock, seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._renewed: dict[int, float] = {}
        self._members: set[int] = set()  # those that have been in a world, and were never without a lease since
        self._gone: set[int] = set()
        self.since: float | None = None
        """When the first lease was renewed here."""
        self._progress = Progress()
        self._written = -PROGRESS_SECONDS  # the progress before

    def told(self, key: str, value: bytes) -> bool:
        """Take what an agent reported; returns whether it was about a lease, or progress."""
        if key == PROGRESS_KEY:
            self._write(Progress.from_line(value.decode(errors="replace")))
            return True
        if not key.startswith(KEY):
            return False
        node = int(key.removeprefix(KEY))
        self._renewed[node] = self._clock() if value else -math.inf  # one that leaves may have been waiting for a world
        if value:
            self.since = self.since or self._renewed[node]
            if value == HELD:
                self._members.add(node)
        else:
            self._members.discard(node)
        return True

    def _write(self, progress: Progress | None) -> None:
        """To the log of the master, what is new; the end and a new world at once, other steps now and then."""
        if progress is None or progress.time <= self._progress.time:
            return
        now = self._clock()
        soon = progress.step < progress.steps and progress.workers == self._progress.workers
        if soon and now - self._written < PROGRESS_SECONDS:
            return
        self._progress, self._written = progress, now
        print(progress.to_line(), flush=True)

    def gone(self, node: int) -> None:
        """The node has gone, or is about to; ids are never used again."""
        self._gone.add(node)

    def held(self) -> set[int]:
        """Ids of the nodes that are in a world, or want to be."""
        now = self._clock()
        return {node for node, at in self._renewed.items() if now - at < LEASE_SECONDS} - self._gone

    def members(self) -> set[int]:
        """Ids of the nodes that are in a world, or were in the last one and want to be in the next."""
        return self._members & self.held()

    def lost(self) -> set[int]:
        """Ids of the nodes that are gone, and of those that gave up a lease or have not renewed it."""
        return (self._renewed.keys() - self.held()) | self._gone


def wait_for_members(leases: Leases, *, restarted: bool) -> None:
    """Have DLRover's rendezvous, in the master's process, wait for the holders of `leases`.

    Args:
        restarted: whether there may be a world already, which this master does not know yet.
    """
    from dlrover.python.master.elastic_training import kv_store_service, rdzv_manager

    found: list[float] = []  # when the first node asked for a world
    # Rank of a node to the rendezvous that it waited for, and what that knew of it.
    silent: dict[int, tuple[Any, Any]] = {}
    put = kv_store_service.KVStoreService.set
    remove = rdzv_manager.RendezvousManager.remove_alive_node
    check = rdzv_manager.RendezvousManager._check_rdzv_completed

    def set_value(store: Any, key: str, value: bytes) -> None:
        if not leases.told(key, value):
            put(store, key, value)
        for rank, (manager, node) in list(silent.items()):
            if node.node_id in leases.held():  # a machine that stood still: it asks once only, and is waiting
                with manager._lock:
                    manager._waiting_nodes.setdefault(rank, node)
                silent.pop(rank, None)  # the agents are heard in several threads

    def remove_alive_node(manager: Any, node: Any) -> None:
        leases.gone(node.id)
        remove(manager, node)

    def check_completed(manager: Any) -> bool:
        if not found:
            found.append(time.monotonic())
        if restarted and time.monotonic() < (leases.since or found[0]) + RECONNECT_SECONDS:
            return False
        lost = leases.lost()
        for rank, node in list(manager._waiting_nodes.items()):
            if node.node_id in lost:
                silent[rank] = manager, manager._waiting_nodes.pop(rank)
        waiting = {node.node_id for node in manager._waiting_nodes.values()}
        if leases.held() - waiting and time.time() - manager._lastcall_time < PATIENCE_SECONDS:
            return False
        if leases.members() and leases.held() <= waiting:  # nobody else is worth a last call
            manager._lastcall_time = 0
        return bool(check(manager))

    kv_store_service.KVStoreService.set = set_value
    rdzv_manager.RendezvousManager.remove_alive_node = remove_alive_node
    rdzv_manager.RendezvousManager._check_rdzv_completed = check_completed
