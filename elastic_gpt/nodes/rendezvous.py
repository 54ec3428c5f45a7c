"""One world at a time: a node that trains holds a lease at the master, and no world is formed without those that do.

DLRover closes a rendezvous some seconds after the last node came, whether or not the nodes that are training have noticed it.
One that notices late (a long step, a busy machine, a master that was away) would be left out and train on beside the new
world, into the same run directory. So each agent renews a lease in the master's key-value store, and here the master waits for
whoever holds one, until it comes, says that it leaves, is known to be gone, or is silent for LEASE_SECONDS.

This is what keeps two worlds from being made; `Ledger.superseded` ends one that was made all the same.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

KEY = "elastic-gpt/lease/"
LEASE_SECONDS = 5.0  # a machine that vanished without a word costs a membership change this much
RENEW_SECONDS = 0.5
PATIENCE_SECONDS = 60.0  # for a node that is alive and does not come; torchelastic gives its workers 30 s to end
RECONNECT_SECONDS = 3.0  # between the first and the last node of a world to find a master that was started anew


class Lease:
    """What an agent tells the master, from its first world on.

    Args:
        report: (key, value) to the master's key-value store; may raise while the master is away.
        node: this node's id.
    """

    def __init__(self, report: Callable[[str, bytes], Any], node: int) -> None:
        self._report, self._key = report, f"{KEY}{node}"
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def hold(self) -> None:
        """From now on, until the process ends."""
        if not self._thread.is_alive() and not self._released.is_set():
            self._tell(b"held")  # before a worker starts, so that no gap is left
            self._thread.start()

    def release(self) -> None:
        """This node leaves: nobody need wait for it. Safe in a signal handler."""
        self._released.set()

    def _renew(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            self._tell(b"held")
        self._tell(b"")

    def _tell(self, value: bytes) -> None:
        try:
            self._report(self._key, value)
        except Exception:  # the master is away; the next one is told
            return


class Leases:
    """What the master knows of them. Times are of a monotonic clock, seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._renewed: dict[int, float] = {}
        self._gone: set[int] = set()

    def told(self, key: str, value: bytes) -> bool:
        """Take what an agent reported; returns whether it was about a lease."""
        if not key.startswith(KEY):
            return False
        node = int(key.removeprefix(KEY))
        if value:
            self._renewed[node] = self._clock()
        else:
            self._renewed.pop(node, None)
        return True

    def gone(self, node: int) -> None:
        """The node is no more, or about to be; ids are never used again."""
        self._gone.add(node)

    def held(self) -> set[int]:
        """Ids of the nodes that are in a world."""
        now = self._clock()
        return {node for node, at in self._renewed.items() if now - at < LEASE_SECONDS} - self._gone


def wait_for_members(leases: Leases, *, restarted: bool) -> None:
    """Have DLRover's rendezvous, in the master's process, wait for the holders of `leases`.

    Args:
        restarted: whether there may be a world already, which this master does not know yet.
    """
    from dlrover.python.master.elastic_training import kv_store_service, rdzv_manager

    found: list[float] = []  # when the first node asked for a world
    put = kv_store_service.KVStoreService.set
    remove = rdzv_manager.RendezvousManager.remove_alive_node
    check = rdzv_manager.RendezvousManager._check_rdzv_completed

    def set_value(store: Any, key: str, value: bytes) -> None:
        if not leases.told(key, value):
            put(store, key, value)

    def remove_alive_node(manager: Any, node: Any) -> None:
        leases.gone(node.id)
        remove(manager, node)

    def check_completed(manager: Any) -> bool:
        if not found:
            found.append(time.monotonic())
        if restarted and time.monotonic() < found[0] + RECONNECT_SECONDS:
            return False
        waiting = {node.node_id for node in manager._waiting_nodes.values()}
        late = leases.held() - waiting
        if late and time.time() - manager._lastcall_time < PATIENCE_SECONDS:
            return False
        return bool(check(manager))

    kv_store_service.KVStoreService.set = set_value
    rdzv_manager.RendezvousManager.remove_alive_node = remove_alive_node
    rdzv_manager.RendezvousManager._check_rdzv_completed = check_completed
