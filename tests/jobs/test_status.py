"""status.py: the state of a job, from what the API server says."""

from typing import Any

import pytest

from elastic_gpt.jobs.manifest import elasticjob
from elastic_gpt.jobs.spec import JobSpec
from elastic_gpt.jobs.status import job_events, job_range, job_state
from tests.jobs.test_pods import Tree, ended, pod


def job(phase: str = "", message: str = "", **spec: Any) -> Tree:
    [tree] = elasticjob(JobSpec(nodes=3))
    tree["spec"] |= spec
    tree["metadata"]["creationTimestamp"] = "2026-11-21T10:00:00Z"
    conditions = [{"type": phase, "message": message, "lastTransitionTime": "2026-11-21T10:01:00Z"}]
    tree["status"] = {"phase": phase, "status": {"conditions": conditions}} if phase else {}
    return tree


def master(number: int = 0, phase: str = "Running", **status: Any) -> Tree:
    labels = {"elasticjob.dlrover/replica-type": "dlrover-master"}
    return {"metadata": {"name": f"elasticjob-gpt-dlrover-master-{number}", "labels": labels}, "spec": {},
            "status": {"phase": phase, **status}}  # fmt: skip


def leaving(tree: Tree) -> Tree:
    tree["metadata"]["deletionTimestamp"] = "2026-11-21T10:02:00Z"
    return tree


def test_a_replacement_takes_its_predecessors_place() -> None:
    pods = [
        pod("w-0", 0),
        pod("w-1", 1, "Failed", containerStatuses=[ended(137)]),
        pod("w-3", 1, "Pending"),
        pod("w-2", 2),
    ]
    state = job_state(job(), pods)
    assert [node.name for node in state.nodes] == ["w-0", "w-3", "w-2"]
    assert (state.running, state.wanted, state.least, state.most) == (2, 3, 1, 4)
    assert state.troubles() == []


# What the operator writes when it has replaced a master and takes restartCount for 0, which 100 is in our manifests.
MISCOUNTED = "The job master failover count 1 is beyond the restart count 0."
BEYOND = "The job master failover count 101 is beyond the restart count 100."
KILLED = {"containerStatuses": [ended(137)]}


@pytest.mark.parametrize(
    ("phase", "message", "pods", "judged"),
    [
        # A lost master: the operator fails the job; then comes another master.
        ("Failed", MISCOUNTED, [master(0, "Failed", **KILLED), pod("w-0", 0)], "Running"),
        ("Failed", MISCOUNTED, [master(0, "Failed", **KILLED), master(1, "Pending"), pod("w-0", 0)], "Running"),
        ("Failed", MISCOUNTED, [master(0, "Failed", **KILLED), master(1), pod("w-0", 0)], "Running"),
        ("Failed", MISCOUNTED, [master(1)], "Running"),
        ("Failed", MISCOUNTED, [master(0, "Failed", **KILLED)], "Failed"),  # and nothing runs any more
        ("Failed", MISCOUNTED, [leaving(master(0)), pod("w-0", 0, "Failed", **KILLED)], "Failed"),
        # A job that has really failed.
        ("Failed", "The job master m failed with exitcode=1.", [master(0, "Failed"), pod("w-0", 0)], "Failed"),
        ("Failed", BEYOND, [master(100, "Failed", **KILLED), pod("w-0", 0)], "Failed"),
        ("Failed", "", [], "Failed"),
        # The end, whatever the operator says of it.
        *[(phase, "", [master(0), pod("w-0", 0, "Succeeded"), pod("w-1", 1, "Succeeded")], "Succeeded")
          for phase in ("", "Created", "Pending", "Running", "Failed", "Succeeded")],
        ("Running", "", [pod("w-0", 0, "Failed", **KILLED), pod("w-1", 0, "Succeeded")], "Succeeded"),
        ("Running", "", [pod("w-0", 0, "Succeeded"), pod("w-1", 1)], "Running"),
        ("Running", "", [pod("w-0", 0, "Succeeded"), pod("w-1", 1, "Failed", **KILLED)], "Running"),
        ("Running", "", [master(0), leaving(pod("w-0", 0, "Succeeded"))], "Running"),  # just resumed
        # The operator was away when the master ended.
        ("Running", "", [master(0, "Succeeded")], "Succeeded"),
        ("Running", "", [master(0, "Failed", containerStatuses=[ended(1)]), pod("w-0", 0)], "Failed"),
        ("Running", "", [master(0, "Failed", containerStatuses=[ended(1)]), master(1), pod("w-0", 0)], "Running"),
        ("Running", "", [master(0, "Failed", **KILLED), pod("w-0", 0)], "Running"),
        ("Running", "", [master(0, "Failed"), pod("w-0", 0)], "Running"),  # lost with its machine: it says nothing more
    ],
)  # fmt: skip
def test_a_job_is_judged_by_what_is_there(phase: str, message: str, pods: list[Tree], judged: str) -> None:
    state = job_state(job(phase, message), pods)
    assert state.phase == judged
    assert state.ended == (judged in ("Succeeded", "Failed"))
    assert bool(state.reason) or judged == phase or (judged, phase) == ("Succeeded", "Running")


@pytest.mark.parametrize("masters", [[], [master(0, "Failed", **KILLED)], [master(0, "Failed", **KILLED), master(1)]])
def test_a_suspended_job_that_lost_its_master_is_suspended(masters: list[Tree]) -> None:
    assert job_state(job("Failed", MISCOUNTED, suspend=True), masters).phase == "Suspended"
    assert job_state(job("Failed", MISCOUNTED, suspend=True), [*masters, leaving(pod("w-0", 0))]).phase == "Suspending"


def test_what_the_operator_says_wrongly_is_told_with_what_is_right() -> None:
    state = job_state(job("Failed", MISCOUNTED), [master(0, "Failed", **KILLED), master(1), pod("w-0", 0)])
    assert "Running (DLRover's operator says Failed: The job master failover count 1 is beyond" in state.headline()
    assert "but its master runs), 1 of 3 nodes" in state.headline()


@pytest.mark.parametrize(
    ("phase", "pods", "spec", "since"),
    [
        ("Running", [master(0)], {}, ""),
        ("Running", [master(0, "Pending")], {}, ""),
        ("Created", [], {}, "2026-11-21T10:01:00Z"),  # as its condition tells
        ("", [], {}, "2026-11-21T10:00:00Z"),
        ("Running", [leaving(master(0))], {}, "2026-11-21T10:01:00Z"),
        (
            "Running",
            [master(0, "Failed", containerStatuses=[
                {"name": "main", "state": {"terminated": {"exitCode": 137, "finishedAt": "2026-11-21T11:00:00Z"}}}])],
            {}, "2026-11-21T11:00:00Z",
        ),
        ("Running", [], {"suspend": True}, ""),
        ("Succeeded", [master(0, "Succeeded")], {}, ""),
        ("Failed", [], {}, ""),
    ],
)  # fmt: skip
def test_a_job_lacks_a_master_since_its_last_change(phase: str, pods: list[Tree], spec: Tree, since: str) -> None:
    assert job_state(job(phase, **spec), pods).masterless_since == since


def test_troubles_of_pods_that_were_replaced_are_history() -> None:
    def prepare(name: str, created: str, phase: str) -> Tree:
        return {"metadata": {"name": f"gpt-prepare-{name}", "creationTimestamp": created}, "spec": {},
                "status": {"phase": phase, "containerStatuses": [ended(1)]}}  # fmt: skip

    state = job_state(
        job("Running"),
        [
            *(master(number, "Failed", **KILLED) for number in (0, 1, 9)),
            master(10),
            prepare("zz", "2026-11-21T10:00:00Z", "Failed"),
            prepare("aa", "2026-11-21T10:00:09Z", "Succeeded"),
            pod("w-1", 1, "Failed", **KILLED),
            pod("w-3", 1, "Failed", **KILLED),
            pod("w-9", 1),
        ],
    )
    assert state.troubles() == []
    assert [node.name for node in state.others] == ["elasticjob-gpt-dlrover-master-10", "gpt-prepare-aa"]
    assert state.others[0].restarts == 10
    assert {node.name for node in state.history} == {
        "elasticjob-gpt-dlrover-master-0", "elasticjob-gpt-dlrover-master-1", "elasticjob-gpt-dlrover-master-9",
        "gpt-prepare-zz", "w-1", "w-3",
    }  # fmt: skip


def test_want_of_memory_is_told_with_the_cure_though_the_pod_was_replaced() -> None:
    starved = {"containerStatuses": [ended(137, "OOMKilled")]}
    replaced = job_state(job("Running"), [master(), pod("w-0", 0), pod("w-1", 1, "Failed", **starved), pod("w-3", 1)])
    [line] = replaced.troubles()
    assert line.startswith("out of memory: w-1 had 11Gi each")
    assert "with a larger --memory" in line
    gone = job_state(job("Running"), [master(), pod("w-0", 0), pod("w-1", 1, "Failed", **starved)])
    assert gone.troubles() == ["w-1: Failed: exit code 137 (OOMKilled: more --memory)", line]


def test_a_node_that_leaves_does_not_count_as_running() -> None:
    leaving = pod("w-1", 1)
    leaving["metadata"]["deletionTimestamp"] = "2026-11-21T10:00:00Z"
    state = job_state(job(), [pod("w-0", 0), leaving])
    assert [node.phase for node in state.nodes] == ["Running", "Leaving"]
    assert state.running == 1


def test_a_suspended_job_says_so_whatever_the_operator_says() -> None:
    tree = job(suspend=True)
    tree["status"] = {"phase": "Running"}
    assert job_state(tree, [pod("w-0", 0)]).phase == "Suspending"
    assert job_state(tree, [pod("w-0", 0, "Succeeded")]).phase == "Suspended"
    assert job_state(tree, []).wanted == 0


def test_a_job_that_no_operator_has_seen_is_new_and_a_failed_one_says_why() -> None:
    assert job_state(job(), []).phase == "New"
    tree = job()
    conditions = [{"type": "Running", "message": ""}, {"type": "Failed", "message": "The job master failed."}]
    tree["status"] = {"phase": "Failed", "status": {"conditions": conditions}}
    assert job_state(tree, []).headline() == "Failed (The job master failed)"


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (["elastic-gpt", "launch", "--nnodes=2:6"], (2, 6)),
        (["dlrover-run", "--nnodes", "2:6", "x"], (2, 6)),
        (["dlrover-run", "--nnodes=3"], (3, 3)),
        (["python", "train.py"], None),
        (["dlrover-run", "--nnodes"], ValueError),
    ],
)
def test_the_range_is_what_the_agents_are_told(args: list[str], found: Any) -> None:
    tree = job()
    tree["spec"]["replicaSpecs"]["worker"]["template"]["spec"]["containers"][0] = {"args": args}
    if found is ValueError:
        with pytest.raises(ValueError, match="write for example --nnodes 2:4"):
            job_range(tree)
    else:
        assert job_range(tree) == found


def test_a_jobs_events_are_those_of_its_pods_and_no_other_jobs() -> None:
    about = [
        "gpt",
        "gpt-edljob-worker-0",
        "elasticjob-gpt-dlrover-master-0",
        "gpt-prepare-x7",
        "data",
        "gpt-2",
        "gpt-2-edljob-worker-0",
    ]
    events = [
        {
            "involvedObject": {"name": name},
            "metadata": {},
            "lastTimestamp": f"2026-11-21T10:00:0{9 - place}Z",
            "type": "Warning",
        }
        for place, name in enumerate(about)
    ]
    assert [event.about for event in job_events("gpt", "data", events)] == about[4::-1]
