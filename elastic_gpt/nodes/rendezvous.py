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
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from elastic_gpt.contract import Progress, progress_file

PROGRESS_KEY = "elastic-gpt/progress"
KEY = "elastic-gpt/lease/"
WAITS, HELD = b"waits", b"held"  # values of a lease
LEASE_SECONDS = 5.0  # how long a machine that disappeared delays a membership change
RENEW_SECONDS = 0.5
PATIENCE_SECONDS = 60.0  # for a node that lives but does not come; torchelastic gives its workers 30 s to end
RECONNECT_SECONDS = 3.0  # in which all nodes of a world find a restarted master
PROGRESS_SECONDS = 5.0  # between two lines of progress in the master's log, at least


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
        self._word = b""  # b"", WAITS or HELD
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def ask(self) -> None:
        """From now on this node waits for a world. It has left its last one."""
        self._say(WAITS)

    def hold(self) -> None:
        """From now on this node is in a world."""
        self._say(HELD)  # before a worker trains, so that there is no gap

    def pause(self) -> None:
        """This node is in no world and asks for none yet, so that others do not wait while its workers start."""
        self._say(b"")

    def _say(self, word: bytes) -> None:
        if self._released.is_set():
            return
        self._word = word
        self._tell(self._key, word)
        if not self._thread.is_alive():
            self._thread.start()
            atexit.register(self._tell_progress)  # the last step comes after the last renewal

    def release(self) -> None:
        """This node leaves, so that no world waits for it. Safe in a signal handler."""
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
        except Exception:  # the master is away; the next one will be told
            return False
        return True


class Leases:
    """What the master knows of the leases. Times are seconds on a monotonic clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._renewed: dict[int, float] = {}
        self._members: set[int] = set()  # nodes that were in a world and have held a lease ever since
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
        self._renewed[node] = self._clock() if value else -math.inf  # one that leaves may have been waiting
        if value:
            self.since = self.since or self._renewed[node]
            if value == HELD:
                self._members.add(node)
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

    def gone(self, node: int) -> None:
        """The node has gone or is going. Its id is never used again."""
        self._gone.add(node)

    def held(self) -> set[int]:
        """Ids of the nodes that are in a world, or want to be."""
        now = self._clock()
        return {node for node, at in self._renewed.items() if now - at < LEASE_SECONDS} - self._gone

    def members(self) -> set[int]:
        """Ids of the nodes that are in a world, or were in the last one and want to be in the next."""
        return self._members & self.held()

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
    # Rank of a silent node to the rendezvous at which it waited, and its record there.
    silent: dict[int, tuple[Any, Any]] = {}
    put = kv_store_service.KVStoreService.set
    remove = rdzv_manager.RendezvousManager.remove_alive_node
    check = rdzv_manager.RendezvousManager._check_rdzv_completed

    def set_value(store: Any, key: str, value: bytes) -> None:
        if not leases.told(key, value):
            put(store, key, value)
        for rank, (manager, node) in list(silent.items()):
            if node.node_id in leases.held():  # the machine had stood still; its agent asks only once, and still waits
                with manager._lock:
                    manager._waiting_nodes.setdefault(rank, node)
                silent.pop(rank, None)  # several threads handle the agents' requests

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
        if leases.members() and leases.held() <= waiting:  # all members are here, so there is no need for a last call
            manager._lastcall_time = 0
        return bool(check(manager))

    kv_store_service.KVStoreService.set = set_value
    rdzv_manager.RendezvousManager.remove_alive_node = remove_alive_node
    rdzv_manager.RendezvousManager._check_rdzv_completed = check_completed
