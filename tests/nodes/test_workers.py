"""workers.py: an agent knows which of its workers wait, hang or have ended, and garbage costs nobody but its sender."""

import json
import os
import secrets
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from elastic_gpt.agent import BEAT_SECONDS, Agent
from elastic_gpt.nodes import workers as workers_room
from elastic_gpt.nodes.workers import LEAST_SECONDS, SILENT_SECONDS, TIMES, Workers
from tests.conftest import PATIENCE, until

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="sockets without files need Linux")


@pytest.fixture
def name() -> str:
    return f"test-{secrets.token_hex(8)}"


def test_an_agent_that_sleeps_looks_again_once_a_worker_waits_and_only_once(name: str) -> None:
    workers, agent = Workers(name), Agent(name, 0)
    sleeper = threading.Thread(target=workers.sleep, args=(10 * PATIENCE,), daemon=True)
    sleeper.start()
    agent.waits(3)
    agent.next_world(lambda: workers.waiting() == {0})
    until(lambda: not sleeper.is_alive())
    began = time.monotonic()
    workers.sleep(0.05)  # else an agent would spin while it waits for a world
    assert time.monotonic() - began >= 0.05


def test_a_worker_that_has_ended_does_not_wait_and_its_successor_does(name: str) -> None:
    workers, first = Workers(name), Agent(name, 0)
    first.waits(3)
    first.next_world(lambda: workers.waiting() == {0})
    first._socket.close()
    until(lambda: not workers.waiting())
    old = Agent(name, 0)
    old.waits(3)
    old.next_world(lambda: workers.waiting() == {0})
    workers.forget()
    second = Agent(name, 0)
    second.waits(-1)
    second.next_world(lambda: workers.waiting() == {0})
    workers.forget()  # from here on messages of the first two do not count
    old._tell(waits=4)
    third = Agent(name, 0)
    third._tell(waits=-1)
    until(lambda: workers.waiting() == {0})
    old._socket.close()
    third._tell(worker=0)  # read after the end of the other
    until(lambda: not workers.waiting())
    assert workers._connections.keys() == {0}


def test_a_worker_that_stands_still_is_named_and_its_successor_is_told(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(workers_room, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("elastic_gpt.agent.BEAT_SECONDS", 1e6)  # one beat, and then it stands still
    workers, _agent = Workers(name), Agent(name, 0)

    def later(seconds: float) -> dict[int, str]:
        """What is seen so many seconds later, if this process looked all the time."""
        while seconds > 0:
            now[0] += min(seconds, BEAT_SECONDS)
            seconds -= BEAT_SECONDS
            found = workers.hung()
        return found

    until(lambda: 0 in workers._beats)
    assert later(SILENT_SECONDS - 1) == {}
    now[0] += 60
    assert workers.hung() == {}  # this process itself had stood still
    assert later(SILENT_SECONDS - 1) == {}
    assert later(2) == {0: f"no sign of life for {SILENT_SECONDS + 1:.0f} s, in step 0"}
    workers.forget()
    assert workers.hung() == {}  # it has ended
    second = Agent(name, 0)
    second.waits(-1)
    assert second.next_world(lambda: bool(workers.waiting() and workers.give({0: {}}))) or second.started_because
    assert second.started_because.startswith("no sign of life")


def test_a_part_of_a_step_that_takes_far_longer_than_any_before_hangs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic_gpt.agent.BEAT_SECONDS", 1e6)
    workers, agent = Workers(name), Agent(name, 0)

    def beats(**told: float) -> dict[int, str]:
        agent._tell(**told)
        until(lambda: workers._beats.get(0, (0, {}))[1] == told)
        return workers.hung()

    until(lambda: 0 in workers._beats)
    assert beats(step=41, busy=LEAST_SECONDS - 1, usual=0.1) == {}
    assert beats(step=41, busy=TIMES * 9 - 1, usual=9.0) == {}
    assert beats(step=1, busy=10 * LEAST_SECONDS, usual=0.0) == {}  # nothing to compare with yet
    assert beats(step=41, busy=LEAST_SECONDS + 1, usual=0.1) == {0: "its part of step 42 took 21 s, before 0.1 s"}


def test_garbage_costs_nobody_but_its_sender(name: str) -> None:
    workers = Workers(name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.connect(f"\0{name}")
        other.send(b"garbage")
        assert other.recv(9) == b""  # closed
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.connect(f"\0{name}")
        other.send(json.dumps({"waits": 3}).encode())  # without saying who it is
        assert other.recv(9) == b""
    agent = Agent(name, 0)
    agent.waits(3)
    agent.next_world(lambda: workers.waiting() == {0})
