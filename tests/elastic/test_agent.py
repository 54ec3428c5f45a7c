"""agent.py: a worker that waits gets a world, and one that trains can be called out of its world."""

import contextlib
import os
import secrets
import threading
import time
import types
from typing import Any

import pytest

from elastic_gpt import agent as agent_module
from elastic_gpt.agent import Agent
from elastic_gpt.contract import WORLDS
from elastic_gpt.nodes.workers import Workers
from tests.conftest import PATIENCE, until

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="sockets without files need Linux")


@pytest.fixture
def name() -> str:
    return f"test-{secrets.token_hex(8)}"


def never() -> bool:
    return False


def test_a_worker_waits_for_its_place_in_a_world(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(variable, "-1")
    workers, agent = Workers(name), Agent(name, 1)
    asked = []

    def ended() -> bool:  # looked at once, while it waits
        if not asked:
            until(lambda: workers.waiting() == {1})
            workers.give({0: {"RANK": "8"}, 1: {"RANK": "9", "WORLD_SIZE": "10"}})
        asked.append(workers.waiting())
        return False

    agent.waits(5)
    assert agent.next_world(ended)
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("9", "10")
    assert asked[0] == set()
    assert not agent.called()
    workers.call()
    until(agent.called)
    assert agent.called()  # until it has come
    agent.waits(6)
    until(lambda: not agent.next_world(lambda: workers.waiting() == {1}))
    workers.call()  # who waits already has come
    workers.give({1: {}})
    assert agent.next_world(never)
    assert not agent.called()


def test_two_threads_may_ask_whether_their_worker_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that have both seen one message come would both read it, and one of them wait for another."""
    workers, agent, both = Workers(name), Agent(name, 0), threading.Barrier(2)

    def look(*args: Any) -> Any:
        if (found := select(*args))[0]:
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.2)
        return found

    select = agent_module.select.select
    monkeypatch.setattr(agent_module, "select", types.SimpleNamespace(select=look))
    until(lambda: workers._connections)
    workers.call()
    asking = [threading.Thread(target=until, args=(agent.called,), daemon=True) for _ in range(2)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(PATIENCE / 8)
    assert not any(thread.is_alive() for thread in asking)


def test_a_worker_that_is_asked_to_end_waits_no_longer(name: str) -> None:
    _workers, agent = Workers(name), Agent(name, 0)
    agent.waits(-1)
    assert not agent.next_world(lambda: True)


def test_the_first_part_in_a_world_has_no_usual_time(name: str) -> None:
    _workers, agent = Workers(name), Agent(name, 0)
    agent.computes(7)
    time.sleep(0.02)  # a compilation
    agent.computed()
    assert agent._usual == 0.0
    agent.computes(8)
    agent.computed()
    assert 0.0 < agent._usual < 0.02


def test_each_world_has_its_own_usual_time_since_a_share_has_another_size(name: str) -> None:
    workers, agent = Workers(name), Agent(name, 0)
    for step in range(2):
        agent.computes(step)
        agent.computed()
    assert agent._usual > 0.0
    agent.waits(2)
    until(lambda: workers.waiting() == {0})
    workers.give({0: {}})
    assert agent.next_world(never)
    assert agent._usual == 0.0


def test_without_an_agent_of_ours_the_environment_names_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORLDS, raising=False)
    assert Agent.of_this_node() is None
