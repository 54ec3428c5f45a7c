"""rendezvous.py, with DLRover's own rendezvous: no second world is formed beside one that trains."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_gpt.contract import Progress
from elastic_gpt.nodes.rendezvous import KEY, LEASE_SECONDS, PROGRESS_KEY, PROGRESS_SECONDS, Ask, Lease, Leases
from tests.conftest import PATIENCE, until

# What replaces methods of DLRover's classes has a process of its own.
MASTER = """
import itertools, sys, time
from elastic_gpt.nodes.rendezvous import KEY, PATIENCE_SECONDS, RECONNECT_SECONDS, Leases, wait_for_members
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
numbers = itertools.count(1)
def says(node, word):
    store.set(KEY + str(node), b"%d %s" % (next(numbers), word))
def holds(node):
    says(node, b"held")
def waits(node, least=1):
    says(node, b"waits elastic-training %d 1 %d 4 0" % (node, least))
def leaves(node):
    says(node, b"leaves")
def show(value):
    print(">", value)
joins(1)
assert world() == [1]
holds(1)
"""

ASK = Ask("elastic-training", rank=7, workers=1, least=2, most=4, last_call=1)


def shown(then: str) -> list[str]:
    """What `then` prints in a process with such a master."""
    done = subprocess.run(
        [sys.executable, "-c", MASTER + then], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.removeprefix("> ") for line in done.stdout.splitlines() if line.startswith("> ")]


def test_a_new_node_waits_for_the_one_that_trains() -> None:
    assert shown("joins(0); show(world()); joins(1); show(world())") == ["[]", "[0, 1]"]


def test_a_round_closes_at_once_when_all_who_hold_a_lease_have_come() -> None:
    slow = "manager._rdzv_params.waiting_timeout = 60; "
    assert shown(slow + "joins(0); show(world()); joins(1); show(world())") == ["[]", "[0, 1]"]
    # A start: who else comes is not known, though one waits already.
    assert shown(slow + "says(1, b''); joins(0); waits(0); show(world())") == ["[]"]
    # A member that asks for the next world, and says so, is one still.
    assert shown(slow + "joins(1); waits(1); joins(0); show(world())") == ["[0, 1]"]


def test_nobody_waits_for_a_node_that_leaves() -> None:
    assert shown("joins(0); show(world()); says(1, b''); show(world())") == ["[]", "[0]"]


def test_nobody_waits_for_a_node_that_is_gone_even_if_its_agent_still_says_otherwise() -> None:
    assert shown("manager.remove_alive_node(Node('worker', 1)); holds(1); joins(0); show(world())") == ["[0]"]


def test_a_node_that_fell_silent_is_waited_for_as_long_as_its_lease_lasts() -> None:
    before, after = LEASE_SECONDS - 0.1, LEASE_SECONDS + 0.1
    assert shown(f"joins(0); now[0] = {before}; show(world()); now[0] = {after}; waits(0); show(world())") == [
        "[]",
        "[0]",
    ]


@pytest.mark.parametrize("end", ["leases.gone(2)", "says(2, b'')", f"now[0] = {LEASE_SECONDS + 0.1}; holds(1)"])
def test_a_node_that_was_lost_while_it_waited_is_in_no_world(end: str) -> None:
    assert shown(f"holds(2); joins(2); {end}; show(world()); joins(1); show(world())") == ["[]", "[1]"]


def test_a_node_that_asked_and_was_lost_before_its_lease_was_heard_is_in_no_world() -> None:
    assert shown(f"joins(2); now[0] = {LEASE_SECONDS + 0.1}; holds(1); joins(1); show(world())") == ["[1]"]


def test_a_machine_that_stood_still_while_it_waited_is_waiting_when_it_comes_back() -> None:
    stands_still = f"holds(2); joins(2); now[0] = {LEASE_SECONDS + 0.1}; holds(1); joins(1); show(world())"
    comes_back = "show(manager.num_nodes_waiting()); waits(2); show(manager.num_nodes_waiting())"
    assert shown(f"{stands_still}; {comes_back}; joins(1); show(world())") == ["[1]", "0", "1", "[1, 2]"]


def test_a_node_that_has_not_seen_its_world_when_another_comes_waits_still() -> None:
    # Node 0 asks, is in a world with node 1, and before it has looked node 2 comes.
    before = "waits(0); joins(0); waits(1); joins(1); show(sorted(manager.get_comm_world(1)[2])); holds(1); "
    after = "waits(2); joins(2); show(world()); waits(1); joins(1); show(world())"
    assert shown(before + after) == ["[0, 1]", "[]", "[0, 1, 2]"]


def test_a_node_that_is_taken_up_before_it_asks_does_not_end_its_world_by_asking() -> None:
    assert shown(
        "waits(1); joins(1); waits(0); show(sorted(manager.get_comm_world(1)[2])); joins(0); show(world())"
    ) == [
        "[0, 1]",
        "[0, 1]",
    ]


def test_a_master_that_was_started_anew_knows_from_the_leases_who_waits_and_for_how_many() -> None:
    anew = "manager = ElasticTrainingRendezvousManager(); says(1, b''); "
    assert shown(anew + "waits(2, least=2); show(world()); waits(3, least=2); show(world())") == ["[]", "[2, 3]"]
    first = "wait_for_members(leases, restarted=True); leases.since = -RECONNECT_SECONDS; "  # its addresses are others
    assert shown(anew + first + "waits(2); show(manager.get_comm_world(2)[0] > 1)") == ["True"]


def test_a_node_that_told_the_range_to_the_master_before_has_this_one_learn_it_from_its_lease() -> None:
    anew = "manager = ElasticTrainingRendezvousManager(); says(1, b''); "
    assert shown(anew + "joins(0); waits(0, least=2); show(world()); show(manager.get_min_nodes())") == ["[]", "2"]


def test_a_clock_that_is_set_neither_ends_the_patience_nor_lengthens_a_wait() -> None:
    forward = "manager._lastcall_time -= 3600; "
    assert shown("joins(0); " + forward + "show(world())") == ["[]"]
    back = "says(1, b''); joins(0); manager._lastcall_time += 3600; "
    assert shown(back + "show(world())") == ["[0]"]


def test_a_late_word_does_not_undo_a_newer_one() -> None:
    assert shown("store.set(KEY + '1', b'0 '); joins(0); show(world())") == ["[]"]


def test_those_who_wait_for_one_that_has_gone_since_their_world_was_formed_come_for_another() -> None:
    formed = (
        "waits(1); joins(1); waits(0); joins(0); show(world()); holds(0); holds(1); show(manager.num_nodes_waiting()); "
    )
    assert shown(formed + "leases.gone(0); show(manager.num_nodes_waiting() > 0)") == ["[0, 1]", "0", "True"]


def test_a_new_master_calls_those_who_may_wait_for_one_that_has_gone_before_their_world_met() -> None:
    anew = "manager = ElasticTrainingRendezvousManager(); holds(2); show(manager.num_nodes_waiting()); "
    # Of a network check, for which nobody waits, agents would take it for a reason not to train.
    check = "from dlrover.python.master.elastic_training.rdzv_manager import NetworkCheckRendezvousManager as Check; "
    then = check + "leases.gone(2); show(manager.num_nodes_waiting()); show(Check().num_nodes_waiting())"
    assert shown(anew + then) == ["0", "1", "0"]


def test_so_they_do_if_a_node_that_asked_for_the_next_world_has_gone_as_well() -> None:
    formed = "waits(1); joins(1); waits(0); joins(0); show(world()); holds(0); holds(1); "
    asked = "joins(2); manager.remove_alive_node(Node('worker', 2)); show(manager.num_nodes_waiting()); "
    assert shown(formed + asked + "leases.gone(0); show(manager.num_nodes_waiting() > 0)") == ["[0, 1]", "0", "True"]


def test_for_a_node_that_is_back_in_a_world_of_old_all_come() -> None:
    silent = f"joins(0); now[0] = {LEASE_SECONDS + 0.1}; waits(0); show(world()); holds(0); show(manager.num_nodes_waiting()); "
    assert shown(silent + "holds(1); show(manager.num_nodes_waiting())") == ["[0]", "0", "1"]


def test_a_node_that_leaves_is_waited_for_until_it_has_saved_its_step_or_one_of_its_world_has_come() -> None:
    assert shown("leaves(1); waits(0); joins(0); show(world()); says(1, b''); show(world())") == ["[]", "[0]"]
    both = "waits(1); joins(1); waits(0); joins(0); show(world()); holds(0); holds(1); leaves(1); waits(2); joins(2); "
    assert shown(both + "waits(0); joins(0); show(world())") == ["[0, 1]", "[0, 2]"]


def test_a_master_that_was_started_anew_gives_the_nodes_time_to_find_it() -> None:
    anew = "wait_for_members(leases, restarted=True); leases.gone(1); joins(0); time.sleep(0.2); show(world())"
    assert shown("leases.since = time.monotonic(); " + anew) == ["[]"]
    assert shown("leases.since = time.monotonic() - RECONNECT_SECONDS; " + anew) == ["[0]"]  # they have found it


def test_a_master_that_was_started_anew_waits_no_longer_once_as_many_as_a_world_may_have_are_there() -> None:
    anew = "wait_for_members(leases, restarted=True); leases.since = time.monotonic() + 1000; "
    come = "[waits(node) for node in (0, 1, 2)]; joins(0); show(world()); waits(3); show(world())"
    assert shown("manager = ElasticTrainingRendezvousManager(); " + anew + come) == ["[]", "[0, 1, 2, 3]"]
    # Node 1 is there, and in a world.
    trains = "[waits(node) for node in (0, 2, 3)]; joins(0); show(world()); waits(1); show(world())"
    assert shown("manager = ElasticTrainingRendezvousManager(); " + anew + trains) == ["[]", "[0, 1, 2, 3]"]


def test_other_keys_of_the_store_are_kept() -> None:
    assert shown("store.set('a', b'1'); show(store.get('a')); show(store.get(KEY + '1'))") == ["b'1'", "b''"]


def test_an_agent_renews_its_lease_until_it_leaves() -> None:
    told: list[tuple[str, bytes]] = []
    lease = Lease(lambda key, value: told.append((key, value)), 7)
    lease.ask(ASK)
    lease.hold()
    until(lambda: len(told) >= 3)
    lease.release()
    until(lambda: told[-1][1].endswith(b" leaves"))  # it has a step in flight
    lease.end()
    lease._thread.join(PATIENCE)
    assert not lease._thread.is_alive()
    assert {key for key, _ in told} == {f"{KEY}7"}
    numbers, words = zip(*(value.split(b" ", 1) for _, value in told), strict=True)
    assert list(dict.fromkeys(words)) == [b"waits elastic-training 7 1 2 4 1", b"held", b"leaves", b""]
    assert sorted(map(int, numbers)) == list(range(1, len(told) + 1))
    assert Leases().told("torch.rendezvous/1", b"x") is False


def test_a_node_whose_workers_start_is_not_waited_for_until_it_is_in_a_world_again() -> None:
    leases = Leases()
    lease = Lease(leases.told, 7)
    lease.hold()
    assert leases.members() == leases.held() == {7}
    lease.ask(ASK)
    assert leases.members() == leases.held() == {7}
    lease.pause()
    assert leases.held() == set()
    lease.ask(ASK)
    assert leases.asks("elastic-training") == {7: ASK}
    assert (leases.members(), leases.held()) == (set(), {7})
    lease.hold()
    assert leases.held() == {7}
    lease.release()
    until(lambda: leases.leaving() == {7})
    lease.end()
    lease.hold()  # it leaves, whatever its rendezvous still comes to
    assert leases.held() == set()


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


def test_progress_comes_with_the_leases_into_the_masters_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now, told = [0.0], {}
    leases = Leases(clock=lambda: now[0])

    def written() -> list[tuple[int, int]]:
        found = map(Progress.from_line, capsys.readouterr().out.splitlines())
        return [(one.step, one.workers) for one in found if one]

    def report(key: str, value: bytes) -> None:
        told[key] = value
        leases.told(key, value)

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("POD_NAME", "gpt-edljob-worker-0")
    monkeypatch.setenv("ELASTIC_JOB_NAME", "gpt")
    monkeypatch.delenv("ELASTIC_GPT_LOCAL", raising=False)
    last_words: list[Callable[[], None]] = []
    monkeypatch.setattr("atexit.register", last_words.append)
    file = tmp_path / "elastic-gpt-progress-gpt-edljob-worker-0"
    lease = Lease(report, 0)
    lease.hold()
    assert told == {f"{KEY}0": b"1 held"}  # before training has begun
    file.write_text(Progress(1.0, 0, 9, workers=2).to_line())
    until(lambda: PROGRESS_KEY in told)
    assert written() == [(0, 2)]
    assert leases.held() == {0}
    lease.release()
    until(lambda: leases.held() == set())
    lease.end()
    # The step in flight is finished after that, and told when the agent ends; nobody waits for this node again.
    file.write_text(Progress(2.0, 1, 9, workers=3).to_line())
    last_words[0]()
    assert written() == [(1, 3)]
    assert leases.held() == set()

    # Steps now and then, an older word of another node never, a new world and the end at once.
    for step, workers, after in [(2, 3, 0), (3, 3, PROGRESS_SECONDS), (4, 2, 0), (1, 3, 99), (9, 2, 0), (9, 2, 99)]:
        now[0] += after
        leases.told(PROGRESS_KEY, Progress(1.0 + step, step, 9, workers=workers).to_line().encode())
    assert written() == [(3, 3), (4, 2), (9, 2)]
