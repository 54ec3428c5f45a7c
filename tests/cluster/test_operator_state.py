"""DLRover's operator as it was seen to be: events of pods and jobs in, phases and masters out. Needs no cluster."""

import copy
import functools
from typing import Any

import pytest

from tests.cluster.operator_state import Manifest, Panic, StateMachine, master_pod, master_service

SUSPEND, RESUME = {"suspend": True}, {"suspend": False}


class World:
    """A server that holds one job of a name in each namespace, and the operator that watches it."""

    def __init__(self, machine: StateMachine | None = None, namespace: str = "a", restarts: int = 100) -> None:
        self.machine = machine or StateMachine()
        template = {"spec": {"containers": [{"name": "main"}]}}
        self.job: Manifest = {
            "metadata": {"name": "gpt", "namespace": namespace, "uid": "1", "labels": {"team": "x"}},
            "spec": {"replicaSpecs": {"dlrover-master": {"restartCount": restarts, "template": template}}},
        }
        self.made: list[int] = []  # masters

    def reconcile(self) -> None:
        """Read the job, make what is to be made, write the status."""
        job, master = self.machine.reconcile(self.job)
        if master is not None:
            self.made.append(master)
        self.job["status"] = copy.deepcopy(job["status"])

    def pod(self, phase: str, code: int | None = None, index: int = 0) -> Manifest:
        pod = master_pod(self.job, index)
        ended = {} if code is None else {"containerStatuses": [{"state": {"terminated": {"exitCode": code}}}]}
        return {**pod, "status": {"phase": phase, **ended}}

    def create(self, index: int = 0) -> None:
        self.machine.pod_created(self.pod("Pending", index=index))

    def place(self, index: int = 0) -> None:
        """The scheduler gives the pod a machine, which changes the pod but not its phase."""
        self.machine.pod_updated(self.pod("Pending", index=index), self.pod("Pending", index=index))

    def run(self, index: int = 0) -> None:
        self.machine.pod_updated(self.pod("Pending", index=index), self.pod("Running", index=index))

    def end(self, code: int, index: int = 0) -> None:
        phase = "Failed" if code else "Succeeded"
        self.machine.pod_updated(self.pod("Running", index=index), self.pod(phase, code, index))

    def start(self) -> None:
        """From a new job to a running master."""
        self.reconcile()
        for step in (self.create, self.reconcile, self.place, self.reconcile, self.run, self.reconcile):
            step()

    @property
    def phase(self) -> str:
        return str(self.job["status"]["phase"])

    @property
    def masters(self) -> dict[str, int]:
        return dict(self.job["status"]["status"]["replicaStatuses"]["dlrover-master"])

    def patch(self, change: dict[str, Any]) -> None:
        self.job["spec"] |= change


def test_a_job_goes_from_created_by_pending_to_running_and_ends_as_its_master_does() -> None:
    for code, phase in ((0, "Succeeded"), (1, "Failed")):
        world, seen = World(), []
        for step in (world.reconcile, world.create, world.place, world.run, functools.partial(world.end, code)):
            step()
            world.reconcile()
            seen.append(world.phase)
        assert seen == ["Created", "Created", "Pending", "Running", phase]
        assert world.made == [0]


def test_a_lost_master_fails_its_job_and_is_replaced_once() -> None:
    world = World()
    world.start()
    world.end(137)
    world.reconcile()
    assert (world.phase, world.made) == ("Running", [0, 1])  # "failover"
    world.create(1)
    world.place(1)  # before the job is read again: its spec is the template alone
    world.reconcile()
    assert world.phase == "Failed"
    conditions = world.job["status"]["status"]["conditions"]
    assert conditions[-1]["message"] == "The job master failover count 1 is beyond the restart count 0."
    world.run(1)
    world.end(137, 1)
    world.reconcile()
    assert (world.phase, world.made) == ("Failed", [0, 1])  # no later master is ever made


def test_a_lost_master_is_a_failover_where_the_job_is_read_before_the_new_one_is_placed() -> None:
    world = World()
    world.start()
    for lost in range(3):
        world.end(137, lost)
        world.reconcile()
        for step in (world.create, world.place, world.run):
            step(lost + 1)
            world.reconcile()
    assert (world.phase, world.made) == ("Running", [0, 1, 2, 3])


def test_a_healed_status_is_taken_over_and_the_next_master_is_made() -> None:
    world = World()
    world.start()
    world.end(137)
    world.reconcile()
    world.create(1)
    world.place(1)
    world.reconcile()
    assert world.phase == "Failed"
    counts = {"initial": 0, "pending": 0, "active": 1, "succeeded": 0, "failed": 1}
    running = {"type": "Running", "status": "True", "reason": "JobRunning", "message": ""}
    world.job["status"] = {
        "phase": "Running",
        "status": {"conditions": [running], "replicaStatuses": {"dlrover-master": counts}},
    }
    world.reconcile()
    world.end(137, 1)
    world.reconcile()
    assert (world.phase, world.made) == ("Running", [0, 1, 2])


def test_more_losses_than_the_restart_count_fail_a_job() -> None:
    world = World(restarts=0)
    world.start()
    world.end(137)
    world.reconcile()
    assert (world.phase, world.made) == ("Failed", [0])


def test_a_master_that_is_deleted_while_the_job_is_suspended_comes_when_it_is_resumed() -> None:
    world = World()
    world.start()
    world.patch(SUSPEND)
    world.reconcile()
    assert world.phase == "Running"  # a suspended job says so until something happens to its master
    world.machine.pod_deleted(world.pod("Running"))
    world.reconcile()
    assert (world.phase, world.made) == ("Suspended", [0])
    world.patch(RESUME)
    world.reconcile()
    world.reconcile()
    assert (world.phase, world.made) == ("Running", [0, 1])


def test_what_happens_while_it_is_away_is_never_looked_up() -> None:
    for ended in ("Failed", "Succeeded"):
        world = World()
        world.start()
        world.machine = StateMachine()  # it was restarted, and meanwhile the master ended
        world.machine.pod_created(world.pod(ended, 137))
        for _ in range(3):
            world.reconcile()
        assert (world.phase, world.made) == ("Running", [0])


def test_a_master_that_the_quota_refused_is_not_tried_again() -> None:
    world = World()
    world.reconcile()  # the server refused the pod, so there is no event
    world.reconcile()
    world.reconcile()
    assert (world.phase, world.made) == ("Created", [0])


def test_deleted_and_applied_at_once_a_job_runs_without_a_master() -> None:
    world = World()
    world.start()
    old = world.pod("Running")
    world.machine.job_deleted(world.job)
    del world.job["status"]
    world.job["metadata"]["uid"] = "2"
    world.reconcile()
    assert world.made == [0, 0]  # the server says that there is one of this name: the old one, which goes now
    world.reconcile()
    world.machine.pod_updated(old, old)
    world.machine.pod_updated(old, {**old, "status": world.pod("Failed", 143)["status"]})
    world.machine.pod_deleted(world.pod("Failed", 143))
    for _ in range(3):
        world.reconcile()
    assert (world.phase, world.made, world.masters["active"]) == ("Running", [0, 0], -1)


def test_the_same_name_in_a_second_namespace_runs_without_pods() -> None:
    first = World()
    first.start()
    second = World(first.machine, "b")
    second.reconcile()
    assert (second.phase, second.made) == ("Running", [])
    second.machine.job_deleted(second.job)  # and the first is not known any more
    first.end(0)
    first.reconcile()
    assert first.phase == "Running"


def test_a_failed_pod_that_does_not_say_how_it_ended_is_the_operators_end() -> None:
    world = World()
    world.start()
    with pytest.raises(Panic):
        world.machine.pod_updated(world.pod("Running"), world.pod("Failed"))


def test_a_master_has_the_labels_and_annotations_of_its_job_and_its_service_an_address() -> None:
    world = World()
    world.job["metadata"]["annotations"] = {"note": "y"}
    pod, service = master_pod(world.job, 2), master_service(world.job)
    assert pod["metadata"]["name"] == "elasticjob-gpt-dlrover-master-2"
    assert pod["metadata"]["labels"]["team"] == "x"
    assert pod["metadata"]["annotations"] == {"note": "y"}
    assert service["spec"]["type"] == "ClusterIP"
    assert "clusterIP" not in service["spec"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
