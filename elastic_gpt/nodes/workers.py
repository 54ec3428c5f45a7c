"""The agent's connections to the workers of its node, to which it gives their worlds (elastic_gpt/agent.py)."""

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from elastic_gpt.agent import BEAT_SECONDS, MOST_BYTES
from elastic_gpt.nodes.standby import same_user

SILENT_SECONDS = 8.0  # without a sign of life; it comes from a separate thread, so the whole process stands still
LEAST_SECONDS, TIMES = 20.0, 10.0  # a gradient hangs if it takes so long and TIMES as long as any before in its world


class Workers:
    """Listens to the workers of this node until the process ends.

    Args:
        name: name of the socket, in Linux's abstract namespace, so that no file is left.
    """

    def __init__(self, name: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"\0{name}")
        self._listener.listen()
        self._lock = threading.Lock()
        self._connections: dict[int, socket.socket] = {}  # by local rank
        self._waiting: set[int] = set()
        self._beats: dict[int, tuple[float, dict[str, float]]] = {}  # by local rank: when it came, and what it said
        self._looked = time.monotonic()
        self._because: dict[int, str] = {}
        self._came = threading.Event()  # a worker has begun to wait since somebody looked
        threading.Thread(target=self._listen, name="workers", daemon=True).start()

    def waiting(self) -> set[int]:
        """Local ranks of the workers that wait for a world."""
        with self._lock:
            return set(self._waiting)

    def sleep(self, seconds: float) -> None:
        """As time.sleep, but it ends once a worker begins to wait for a world."""
        self._came.wait(seconds)
        self._came.clear()

    def call(self) -> None:
        """Ask the workers that are in a world to leave it after the current step."""
        with self._lock:
            for rank in self._connections.keys() - self._waiting:
                self._tell(rank, {"come": True})

    def give(self, worlds: Mapping[int, Mapping[str, str]]) -> None:
        """Give each waiting worker its place in the next world. `worlds`: local rank to environment variables."""
        with self._lock:
            for rank in self._waiting & worlds.keys():
                self._tell(rank, {"world": dict(worlds[rank]), "because": self._because.pop(rank, "")})
            self._waiting -= worlds.keys()

    def hung(self) -> dict[int, str]:
        """Local ranks of the workers that hang, and one line for each that says why. Its replacement is told."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked > BEAT_SECONDS:  # this process itself was stopped or busy
                self._beats = {rank: (now, beat) for rank, (_, beat) in self._beats.items()}
            self._looked = now
            found = {}
            for rank, (heard, beat) in self._beats.items():
                step = int(beat["step"]) + 1
                if now - heard > SILENT_SECONDS:
                    found[rank] = f"no sign of life for {now - heard:.0f} s, in step {step}"
                elif beat["usual"] and beat["busy"] > max(LEAST_SECONDS, TIMES * beat["usual"]):
                    found[rank] = f"its part of step {step} took {beat['busy']:.0f} s, before {beat['usual']:.1f} s"
            self.started_because(found)
            return found

    def started_because(self, reasons: Mapping[int, str]) -> None:
        """Remember why workers were ended, by local rank, to tell their replacements."""
        self._because |= reasons

    def forget(self) -> None:
        """Forget all workers, since others are started in their place. Late messages of the old ones are ignored."""
        with self._lock:
            self._connections.clear()
            self._waiting.clear()
            self._beats.clear()

    def _tell(self, rank: int, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has just ended, which the agent notices itself
            self._connections[rank].sendall(json.dumps(message).encode())

    def _listen(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ)
        ranks: dict[socket.socket, int] = {}
        while True:
            for key, _ in selector.select():
                if key.fileobj is self._listener:
                    connection, _ = self._listener.accept()
                    if same_user(connection):
                        selector.register(connection, selectors.EVENT_READ)
                    else:
                        connection.close()
                    continue
                connection = key.fileobj  # type: ignore[assignment]
                try:
                    self._take(connection, json.loads(connection.recv(MOST_BYTES)), ranks)
                except (OSError, ValueError, LookupError):  # it has ended, or has sent garbage
                    selector.unregister(connection)
                    self._end(connection, ranks.pop(connection, -1))

    def _take(self, connection: socket.socket, message: dict[str, Any], ranks: dict[socket.socket, int]) -> None:
        with self._lock:
            if "worker" in message:
                ranks[connection] = rank = message["worker"]
                self._connections[rank] = connection
                self._waiting.discard(rank)
            elif self._connections.get(rank := ranks[connection]) is connection:
                if "busy" in message:
                    self._beats[rank] = time.monotonic(), message
                elif message["waits"] >= -1:
                    self._waiting.add(rank)
                    self._came.set()

    def _end(self, connection: socket.socket, rank: int) -> None:
        with self._lock:
            connection.close()
            if self._connections.get(rank) is connection:  # no other worker has taken its place
                del self._connections[rank]
                self._waiting.discard(rank)
                self._beats.pop(rank, None)
