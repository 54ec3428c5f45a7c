"""The agent of this node, as its workers see it: each world comes from it, and a worker that lives on asks it for the next.

    worker  ── {"worker": LOCAL_RANK} ──►  agent   (elastic_gpt/nodes/workers.py)
            ── {"waits": STEP} ──►                 it has left its world, or never had one, and waits with its state
            ── {"step": N, "busy": S, ...} ──►     twice a second: it lives, and computes in step N for S seconds
            ◄── {"world": {...}} ──                RANK, WORLD_SIZE and their kin of the next one
            ◄── {"come": true} ──                  the members change: finish the step in flight, then wait

Without such an agent (torchrun, a process alone) the environment names the one world that this process will ever be in.
"""

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable

from elastic_gpt.contract import WORLDS

LOOK_SECONDS = 0.1  # between two looks whether a signal has come
MOST_BYTES = 1 << 16  # of a message
BEAT_SECONDS = 0.5  # between two signs of life


class Agent:
    """A worker's connection to its agent.

    Args:
        name: of the agent's socket, in Linux's abstract namespace.
        local_rank: of this worker on its node.
    """

    def __init__(self, name: str, local_rank: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # a message is read whole or not at all
        self._socket.connect(f"\0{name}")
        self._called = False
        self._step, self._steps = -1, 0  # of the gradient that is being computed; how many were, in this world
        self._began: float | None = None
        self._usual = 0.0  # seconds of the longest one before
        self.started_because = ""
        """Why the agent ended this worker's predecessor, in a line."""
        self._tell(worker=local_rank)
        threading.Thread(target=self._beat, name="beats", daemon=True).start()

    @classmethod
    def of_this_node(cls) -> "Agent | None":
        """The agent that gives out worlds here; None where this process was started into its one world."""
        name = os.environ.get(WORLDS)
        return cls(name, int(os.environ["LOCAL_RANK"])) if name else None

    def called(self) -> bool:
        """Whether the members change: this worker finishes the step in flight with all others, and waits for a world."""
        while not self._called and (message := self._read(0.0)):
            self._called = "come" in message
        return self._called

    def next_world(self, step: int, ended: Callable[[], bool]) -> bool:
        """Wait for a world and put its place for this worker into the environment.

        Args:
            step: updates done in the state that this worker holds; -1: it holds none.
            ended: whether this worker was asked to end meanwhile.

        Returns:
            Whether there is one; False: this worker was asked to end.
        """
        self._tell(waits=step)
        while not ended():
            if "world" in (message := self._read(LOOK_SECONDS)):
                os.environ.update(message["world"])
                self.started_because = message["because"]
                self._called, self._steps = False, 0
                return True
        return False

    def computes(self, step: int) -> None:
        """This worker begins its part of the gradient of a step."""
        self._step, self._began = step, time.monotonic()

    def computed(self) -> None:
        """It has its part: from here on it waits for others, or does what has no usual time."""
        if self._began is not None and self._steps:  # the first one in a world may hold a compilation
            self._usual = max(self._usual, time.monotonic() - self._began)
        self._began, self._steps = None, self._steps + 1

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # the agent has gone, and this process goes with it
            while True:
                began = self._began
                busy = time.monotonic() - began if began is not None and self._steps else 0.0
                self._tell(step=self._step, busy=busy, usual=self._usual)
                time.sleep(BEAT_SECONDS)

    def _read(self, seconds: float) -> dict:
        """The next message, if one comes in time."""
        if not select.select([self._socket], [], [], seconds)[0]:
            return {}
        content = self._socket.recv(MOST_BYTES)
        if not content:
            raise ConnectionError("the agent of this node has gone")
        return json.loads(content)

    def _tell(self, **message: float) -> None:
        self._socket.sendall(json.dumps(message).encode())
