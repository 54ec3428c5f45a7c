"""A worker's connection to the agent of its node, which gives it one world after the other.

    worker  ── {"worker": LOCAL_RANK} ──►  agent   (elastic_gpt/nodes/workers.py)
            ── {"waits": STEP} ──►                 it is in no world, and waits for one with the state of this step
            ── {"step": N, "busy": S, ...} ──►     twice a second: it lives, and has computed in step N for S seconds
            ◄── {"world": {...}} ──                the next world: RANK, WORLD_SIZE and so on
            ◄── {"come": true} ──                  the members change: finish the step in flight, then wait

Without such an agent (torchrun, a single process) the environment names the only world that this
process will be in.
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

LOOK_SECONDS = 0.1  # between two checks for a signal
MOST_BYTES = 1 << 16  # most bytes of a message
BEAT_SECONDS = 0.5  # between two signs of life


class Agent:
    """A worker's connection to its agent.

    Args:
        name: name of the agent's socket, in Linux's abstract namespace.
        local_rank: number of this worker on its node.
    """

    def __init__(self, name: str, local_rank: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps messages apart
        self._socket.connect(f"\0{name}")
        self._called, self._calls = False, threading.Lock()
        self._step, self._steps = -1, 0  # step whose gradient is computed; steps so far in this world
        self._began: float | None = None
        self._usual = 0.0  # seconds of the longest step but the first in this world; 0: none yet
        self.started_because = ""
        """One line that says why the agent ended the worker that was here before; "" if it did not."""
        self._tell(worker=local_rank)
        threading.Thread(target=self._beat, name="beats", daemon=True).start()

    @classmethod
    def of_this_node(cls) -> "Agent | None":
        """The agent that started this process; None if it has only one world, from its environment."""
        name = os.environ.get(WORLDS)
        return cls(name, int(os.environ["LOCAL_RANK"])) if name else None

    def called(self) -> bool:
        """Whether the members change, so that this worker should finish the current step and wait for a world."""
        with self._calls:  # a thread that waits in a collective asks as well
            while not self._called and (message := self._read(0.0)):
                self._called = "come" in message
            return self._called

    def waits(self, step: int) -> None:
        """Tells the agent that this worker wants a world, once for each. What it still has to do can be done meanwhile.

        Args:
            step: updates done in the state that this worker has in memory; -1: it has none.
        """
        self._tell(waits=step)

    def next_world(self, ended: Callable[[], bool]) -> bool:
        """Wait for a world and put its place for this worker into the environment.

        Args:
            ended: tells whether this worker was asked to end.

        Returns:
            False if this worker was asked to end, so that there is no world.
        """
        while not ended():
            with self._calls:
                message = self._read(LOOK_SECONDS)
            if "world" in message:
                os.environ.update(message["world"])
                self.started_because = message["because"]
                self._called, self._steps, self._usual = False, 0, 0.0  # a share of another size takes another time
                return True
        return False

    def computes(self, step: int) -> None:
        """Tells the agent that this worker begins its part of the gradient of a step."""
        self._step, self._began = step, time.monotonic()

    def computed(self) -> None:
        """Tells the agent that the part is done. What follows, such as waiting for others, has no usual duration."""
        if self._began is not None and self._steps:  # the first step in a world may include a compilation
            self._usual = max(self._usual, time.monotonic() - self._began)
        self._began, self._steps = None, self._steps + 1

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # the agent has died, and this process dies with it
            while True:
                began = self._began
                busy = time.monotonic() - began if began is not None else 0.0
                self._tell(step=self._step, busy=busy, usual=self._usual)
                time.sleep(BEAT_SECONDS)

    def _read(self, seconds: float) -> dict:
        """The next message; {} if none comes in time."""
        if not select.select([self._socket], [], [], seconds)[0]:
            return {}
        content = self._socket.recv(MOST_BYTES)
        if not content:
            raise ConnectionError("the agent of this node has gone")
        return json.loads(content)

    def _tell(self, **message: float) -> None:
        self._socket.sendall(json.dumps(message).encode())
