"""causes.py: why a job has no master, and the cure."""

from collections.abc import Callable
from typing import Any

import pytest

from elastic_gpt.jobs.manifest import manifests
from elastic_gpt.jobs.spec import JobSpec
from tests.jobs.cluster import StubCluster

Job = Callable[..., int]
Output = pytest.CaptureFixture[str]
CURE = "`elastic-gpt job delete elastic-gpt`, which waits until all of it is gone, then submit it again"


@pytest.fixture
def lost(stub: StubCluster) -> dict[str, Any]:
    """A job that DLRover's operator, which runs, calls running, and for which it has made no master."""
    for tree in manifests(JobSpec()):
        stub.add(tree)
    stub.add({"kind": "Deployment", "metadata": {"name": "dlrover-controller-manager", "namespace": "dlrover"},
              "status": {"availableReplicas": 1}})  # fmt: skip
    tree = stub.get("ElasticJob", "elastic-gpt")
    assert tree
    tree["status"] = {"phase": "Running"}
    return tree


def told(job: Job, capsys: Output) -> str:
    """What `status` says, in one line of blanks: the table breaks lines."""
    assert job("status", "elastic-gpt") == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("phase", ["Created", "Running", "Pending"])
def test_a_job_deleted_and_applied_too_fast_is_told_with_the_cure(
    lost: Any, job: Job, capsys: Output, phase: str
) -> None:
    lost["status"] = {"phase": phase}
    said = told(job, capsys)
    assert f"{phase} (no master for" in said
    assert "deleted and made anew before the old one's pods were gone" in said
    assert CURE in said


@pytest.mark.usefixtures("lost")
def test_a_master_that_ended_unseen_by_the_operator_is_named(stub: StubCluster, job: Job, capsys: Output) -> None:
    stub.master("elastic-gpt", 3, "Failed", containerStatuses=[{"name": "main", "state": {}}])
    said = told(job, capsys)
    assert "elasticjob-elastic-gpt-dlrover-master-3 has ended, and DLRover's operator did not see it" in said
    assert CURE in said


@pytest.mark.usefixtures("lost")
def test_a_cluster_without_the_operator_is_told_how_to_install_it(stub: StubCluster, job: Job, capsys: Output) -> None:
    del stub.objects["Deployment", "dlrover", "dlrover-controller-manager"]
    said = told(job, capsys)
    assert "DLRover's operator is not in this cluster: kubectl apply -k" in said


@pytest.mark.usefixtures("lost")
def test_an_operator_that_crashes_is_told_with_its_last_words(stub: StubCluster, job: Job, capsys: Output) -> None:
    stub.objects["Deployment", "dlrover", "dlrover-controller-manager"]["status"] = {}
    crashing(stub, "panic: runtime error: invalid memory address or nil pointer dereference")
    said = told(job, capsys)
    assert "DLRover's operator does not run" in said
    assert "CrashLoopBackOff" in said
    assert "its last words: panic: runtime error" in said


def crashing(stub: StubCluster, *lines: str) -> None:
    """An operator's pod whose manager has written `lines` and ended."""
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s restarting failed container"}}
    pod = stub.pod("manager-x", {"control-plane": "controller-manager"})
    del stub.objects["Pod", "training", "manager-x"]
    pod["metadata"]["namespace"] = "dlrover"
    pod["status"] = {
        "phase": "Running",
        "containerStatuses": [{"name": "manager", "restartCount": 7, "state": waiting}],
    }
    stub.add(pod)
    stub.logs["manager-x"] = [f"2026-11-21T10:00:00Z {line}" for line in lines]


@pytest.mark.usefixtures("lost")
def test_a_job_of_the_same_name_in_another_namespace_is_named(stub: StubCluster, job: Job, capsys: Output) -> None:
    [other] = manifests(JobSpec(namespace="theirs"), ("job",))
    stub.add(other)
    said = told(job, capsys)
    assert "namespace theirs has a job of this name" in said
    assert "submit it under another name" in said


@pytest.mark.usefixtures("lost")
@pytest.mark.parametrize(
    ("hard", "used", "what"),
    [
        ({"pods": "10"}, {"pods": "10"}, "quota team allows 10 of pods, of which 10 are used: make room"),
        ({"requests.memory": "8Gi"}, {"requests.memory": "7000Mi"}, "allows 8Gi of requests.memory, of which 7000Mi"),
        ({"limits.cpu": "4"}, {"limits.cpu": "3500m"}, "allows 4 of limits.cpu, of which 3500m"),
        ({"pods": "10", "requests.cpu": "9", "secrets": "1"}, {"pods": "9", "requests.cpu": "8", "secrets": "1"}, ""),
    ],
)
def test_a_quota_that_is_used_up_is_told_with_its_numbers(
    stub: StubCluster, job: Job, capsys: Output, hard: Any, used: Any, what: str
) -> None:
    metadata = {"name": "team", "namespace": "training"}
    stub.add({"kind": "ResourceQuota", "metadata": metadata, "status": {"hard": hard, "used": used}})
    said = told(job, capsys)
    assert (what or "was refused one (a quota)") in said
    assert CURE in said


@pytest.mark.usefixtures("lost")
def test_an_event_of_the_operators_says_who_refused(stub: StubCluster, job: Job, capsys: Output) -> None:
    stub.add({"kind": "Event", "metadata": {"name": "e", "namespace": "training"}, "type": "Warning",
              "involvedObject": {"name": "elastic-gpt"}, "reason": "Failed", "lastTimestamp": "2026-11-21T10:00:00Z",
              "message": "master pod created failed: pods is forbidden: exceeded quota"})  # fmt: skip
    assert "(no master for" in (said := told(job, capsys))
    assert "exceeded quota: make room, then" in said


@pytest.mark.usefixtures("lost")
def test_what_this_user_may_not_read_is_ignored(stub: StubCluster, job: Job, capsys: Output) -> None:
    stub.forbidden = {"Deployment", "ResourceQuota", "Event"}
    stub.narrow = {"ElasticJob"}
    assert CURE in told(job, capsys)


def test_a_master_that_is_only_just_missing_is_waited_for_in_silence(
    stub: StubCluster, lost: Any, job: Job, capsys: Output
) -> None:
    lost["metadata"]["creationTimestamp"] = "2100-01-01T00:00:00Z"
    assert "no master" not in told(job, capsys)
    stub.master("elastic-gpt", 0, "Pending")
    lost["metadata"]["creationTimestamp"] = "2026-11-21T10:00:00Z"
    assert "no master" not in told(job, capsys)


@pytest.mark.usefixtures("lost")
def test_wait_and_resume_tell_the_reason_too(job: Job, capsys: Output) -> None:
    assert job("wait", "elastic-gpt", "--timeout", 0.2) == 124
    assert CURE in capsys.readouterr().out
    assert job("resume", "elastic-gpt", "--timeout", 0.2) == 124
    assert CURE in capsys.readouterr().out
