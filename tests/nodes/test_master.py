"""master.py: which nodes of a running job are started and removed. The real master runs in tests/cluster."""

import signal
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_gpt.jobs.status import wanted_nodes
from elastic_gpt.nodes.master import Scaling, decide
from tests.conftest import PATIENCE, environment


@dataclass
class Record:
    """The fields of DLRover's record of a node that the decision reads."""

    id: int
    rank_index: int
    status: str = "Running"
    relaunchable: bool = True
    name: str = ""
    is_released: bool = False


def job(replicas: int, *, nnodes: str | None = "1:4", suspend: bool = False, split: bool = False) -> dict[str, Any]:
    args = ["elastic-gpt", "launch", *(["--nnodes", nnodes] if split else [f"--nnodes={nnodes}"] if nnodes else [])]
    worker = {"replicas": replicas, "template": {"spec": {"containers": [{"args": args}]}}}
    return {"spec": {"suspend": suspend, "replicaSpecs": {"worker": worker}}}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (job(3), 3),
        (job(9), 4),
        (job(0), 1),
        (job(1, nnodes="2:4"), 2),
        (job(9, split=True), 4),
        (job(7, nnodes=None), 7),
        (job(3, suspend=True), 0),
    ],
)
def test_replicas_are_followed_between_minimum_and_maximum(given: dict[str, Any], wanted: int) -> None:
    assert wanted_nodes(given) == wanted


def test_nothing_is_done_where_all_is_well() -> None:
    assert decide([Record(0, 0), Record(1, 1, "Pending"), Record(2, 2, "Initial")], 3) == ([], [])


def test_missing_ranks_are_started_and_the_highest_leave() -> None:
    nodes = [Record(0, 0), Record(1, 1), Record(2, 2)]
    assert decide(nodes, 5) == ([3, 4], [])
    assert decide(nodes, 1) == ([], nodes[1:])
    assert decide(nodes, 0) == ([], nodes)


def test_what_dlrover_replaces_is_left_to_it() -> None:
    for status in ("Failed", "Deleted"):
        assert decide([Record(0, 0, status), Record(1, 1)], 2) == ([], [])
    # Its replacement is a new record of the same rank.
    nodes = [Record(0, 0, "Failed", relaunchable=False), Record(1, 1), Record(2, 0)]
    assert decide(nodes, 2) == ([], [])
    assert decide(nodes, 1) == ([], [nodes[1]])


def test_a_rank_that_was_taken_away_can_come_back() -> None:
    nodes = [Record(0, 0), Record(1, 1, "Deleted", relaunchable=False)]
    assert decide(nodes, 1) == ([], [])
    assert decide(nodes, 2) == ([1], [])


def test_no_node_is_started_for_a_job_whose_training_is_over() -> None:
    assert decide([Record(0, 0, "Succeeded"), Record(1, 1)], 4) == ([], [])


def manager_of(nodes: dict[int, Record], spec: dict[str, Any]) -> SimpleNamespace:
    """What we use of DLRover's job manager; `stays` is what it hears from us each time that nodes go or come."""
    made = SimpleNamespace(
        pend_without_workers=lambda: False,
        stays=[],
        _k8s_client=SimpleNamespace(get_custom_resource=lambda **_: spec),
        _worker_manager=SimpleNamespace(_get_mutable_nodes=lambda: nodes),
        _job_context=SimpleNamespace(update_job_node=lambda _: None),
    )
    look = lambda _: made.stays.append(made.pend_without_workers())  # noqa: E731
    made._scaler = SimpleNamespace(scale=look, _remove_nodes=look, _create_node_queue=[])
    return made


@pytest.mark.parametrize("slow", [False, True])  # whether the old nodes go after the resume only
def test_the_master_of_a_suspended_job_ends_neither_then_nor_while_it_resumes(
    monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    nodes = {0: Record(0, 0), 1: Record(1, 1)}
    spec = job(2, suspend=True)
    manager = manager_of(nodes, spec)
    scaling = Scaling(manager, "gpt")
    monkeypatch.setattr(scaling, "_new_node", lambda rank: Record(2 + rank, rank, "Initial"))
    scaling.reconcile()
    # DLRover takes a released node to have ended, and one that it did not see go for one that runs, for ever.
    assert not any(node.is_released for node in nodes.values())
    if slow:
        spec["spec"]["suspend"] = False
        scaling.reconcile()
        assert manager.pend_without_workers()
    for node in nodes.values():
        node.status = "Deleted"
    assert manager.pend_without_workers()
    if not slow:
        scaling.reconcile()
        assert manager.pend_without_workers()
        spec["spec"]["suspend"] = False
    scaling.reconcile()
    assert manager.stays == [True, True, True]
    assert not manager.pend_without_workers()


def test_the_master_of_a_job_that_ended_while_it_was_suspended_ends_when_it_is_resumed() -> None:
    spec = job(1, suspend=True)
    manager = manager_of({0: Record(0, 0, "Succeeded")}, spec)
    scaling = Scaling(manager, "gpt")
    scaling.reconcile()
    assert manager.pend_without_workers()
    spec["spec"]["suspend"] = False
    scaling.reconcile()
    assert not manager.pend_without_workers()


def test_a_master_puts_the_status_of_its_job_right_with_the_one_right_it_has() -> None:
    told = "The job master failover count 1 is beyond the restart count 0."
    status = {"conditions": [{"type": "Failed", "status": "True", "message": told}], "replicaStatuses": {}}
    spec = {**job(1), "metadata": {"namespace": "training"}, "status": {"phase": "Failed", "status": status}}
    spec["spec"]["replicaSpecs"]["dlrover-master"] = {"restartCount": 100}
    manager, patched = manager_of({0: Record(0, 0)}, spec), []
    manager._k8s_client.api_instance = SimpleNamespace(
        patch_namespaced_custom_object_status=lambda **words: patched.append(words)
    )
    Scaling(manager, "gpt").heal()
    Scaling(manager, "gpt").reconcile()
    spec["status"]["phase"] = "Running"
    Scaling(manager, "gpt").reconcile()
    assert [words["body"]["status"]["phase"] for words in patched] == ["Running", "Running"]
    assert (patched[0]["name"], patched[0]["namespace"], patched[0]["plural"]) == ("gpt", "training", "elasticjobs")


DLROVERS_LOOP = """
import os, signal, time
from elastic_gpt.nodes import master

def run(*arguments):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except KeyboardInterrupt:
        return 0

master._run_dlrover = run
raise SystemExit(master.main(["--namespace=training", "--job-name=gpt"]))
"""


def test_a_master_whose_pod_is_deleted_does_not_end_well() -> None:
    command = [sys.executable, "-c", DLROVERS_LOOP]
    done = subprocess.run(command, env=environment(KUBECONFIG="/nowhere"), timeout=PATIENCE, check=False)
    assert done.returncode == -signal.SIGTERM  # with 0 the job would have Succeeded
