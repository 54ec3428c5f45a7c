"""DLRover's own rendezvous, in this process: no second world beside one that trains."""

import subprocess
import sys
from pathlib import Path

from elastic_gpt.nodes.rendezvous import KEY, LEASE_SECONDS, Lease, Leases
from tests.conftest import PATIENCE, until

# What replaces methods of DLRover's classes has a process of its own.
MASTER = """
import sys, time
from elastic_gpt.nodes.rendezvous import KEY, Leases, wait_for_members
now = [0.0]
leases = Leases(clock=lambda: now[0])
wait_for_members(leases, restarted=False)
from dlrover.python.common.node import Node
from dlrover.python.master.elastic_training.kv_store_service import KVStoreService
from dlrover.python.master.elastic_training.rdzv_manager import ElasticTrainingRendezvousManager
store, manager = KVStoreService(), ElasticTrainingRendezvousManager()
manager.update_rdzv_params(min_nodes=1, max_nodes=4, waiting_timeout=0, node_unit=1)
def world():
    return sorted(manager.get_comm_world(0)[2])
def joins(node):
    manager.join_rendezvous(node, node, 1)
def holds(node):
    store.set(KEY + str(node), b"held")
def show(value):
    print(">", value)
joins(1)
assert world() == [1]
holds(1)
"""


def shown(then: str) -> list[str]:
    """What `then` prints in a process with such a master."""
    done = subprocess.run(
        [sys.executable, "-c", MASTER + then], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.removeprefix("> ") for line in done.stdout.splitlines() if line.startswith("> ")]


def test_a_new_node_waits_for_the_one_that_trains() -> None:
    assert shown("joins(0); show(world()); joins(1); show(world())") == ["[]", "[0, 1]"]


def test_nobody_waits_for_a_node_that_leaves() -> None:
    assert shown("joins(0); show(world()); store.set(KEY + '1', b''); show(world())") == ["[]", "[0]"]


def test_nobody_waits_for_a_node_that_is_gone_even_if_its_agent_still_says_otherwise() -> None:
    assert shown("manager.remove_alive_node(Node('worker', 1)); holds(1); joins(0); show(world())") == ["[0]"]


def test_a_node_that_fell_silent_is_waited_for_as_long_as_its_lease_lasts() -> None:
    before, after = LEASE_SECONDS - 0.1, LEASE_SECONDS + 0.1
    assert shown(f"joins(0); now[0] = {before}; show(world()); now[0] = {after}; show(world())") == ["[]", "[0]"]


def test_a_master_that_was_started_anew_gives_the_nodes_time_to_find_it() -> None:
    anew = "wait_for_members(leases, restarted=True); leases.gone(1); joins(0); time.sleep(0.2); show(world())"
    assert shown(anew) == ["[]"]


def test_other_keys_of_the_store_are_kept() -> None:
    assert shown("store.set('a', b'1'); show(store.get('a')); show(store.get(KEY + '1'))") == ["b'1'", "b''"]


def test_an_agent_renews_its_lease_until_it_leaves() -> None:
    told: list[tuple[str, bytes]] = []
    lease = Lease(lambda key, value: told.append((key, value)), 7)
    lease.hold()
    lease.hold()  # in its next world
    until(lambda: len(told) >= 3)
    lease.release()
    lease._thread.join(PATIENCE)
    assert not lease._thread.is_alive()
    assert set(told[:-1]) == {(f"{KEY}7", b"held")}
    assert told[-1] == (f"{KEY}7", b"")
    assert Leases().told("torch.rendezvous/1", b"x") is False


def test_two_worlds_of_one_run_the_earlier_ends(tmp_path: Path) -> None:
    from elastic_gpt.ledger import Ledger

    one, other = Ledger(tmp_path), Ledger(tmp_path)
    one.begin_life(["a"], 1, 0, "start", 0)
    assert not one.superseded()
    one.write("saved", step=5)
    assert not one.superseded()
    other.begin_life(["b"], 1, 0, "start", 0)
    assert one.superseded()
    assert not other.superseded()
