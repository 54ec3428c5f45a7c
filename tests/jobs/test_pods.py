"""pods.py: how a pod is described."""

from typing import Any

import pytest

from elastic_gpt.jobs.pods import pod_trouble

Tree = dict[str, Any]


def pod(name: str, rank: int, phase: str = "Running", **status: Any) -> Tree:
    labels = {"elasticjob.dlrover/replica-type": "worker", "elasticjob.dlrover/rank-index": str(rank)}
    labels |= {"elasticjob.dlrover/relaunch-count": name.rpartition("-")[2]}
    return {"metadata": {"name": name, "labels": labels}, "spec": {}, "status": {"phase": phase, **status}}


def waiting(reason: str, message: str = "", container: str = "main") -> Tree:
    return {"name": container, "state": {"waiting": {"reason": reason, "message": message}}}


def ended(code: int, reason: str = "Error") -> Tree:
    return {"name": "main", "state": {"terminated": {"exitCode": code, "reason": reason}}}


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"phase": "Running"}, ""),
        ({"phase": "Succeeded"}, ""),
        ({"phase": "Pending"}, ""),
        (
            {"phase": "Pending", "conditions": [
                {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes\nare available"}]},
            "Unschedulable: 0/3 nodes are available",
        ),
        ({"phase": "Pending", "containerStatuses": [waiting("ImagePullBackOff", "Back-off pulling image")]},
         "ImagePullBackOff: Back-off pulling image"),
        ({"phase": "Pending", "containerStatuses": [waiting("ContainerCreating")]}, ""),
        ({"phase": "Pending", "containerStatuses": [waiting("CreateContainerConfigError", "no such user")]},
         "CreateContainerConfigError: no such user"),
        ({"phase": "Pending", "initContainerStatuses": [{"name": "wait-for-data", "state": {"running": {}}}],
          "containerStatuses": [waiting("PodInitializing")]}, "waits for the data that `prepare` makes"),
        ({"phase": "Failed", "containerStatuses": [ended(137)]}, "exit code 137"),
        ({"phase": "Failed", "containerStatuses": [{"name": "main", "state": {}}]}, ""),  # lost with its machine
        ({"phase": "Running", "containerStatuses": [
            {"name": "kube-rbac-proxy", "state": {"running": {}}}, waiting("CrashLoopBackOff", "back-off 5m0s restarting")]},
         "CrashLoopBackOff: back-off 5m0s restarting"),
        ({"phase": "Failed", "containerStatuses": [ended(137, "OOMKilled")]}, "exit code 137 (OOMKilled: more --memory)"),
        ({"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."},
         "Evicted The node was low on resource: memory."),
        ({}, ""),
    ],
)  # fmt: skip
def test_a_pod_that_does_not_run_says_why_in_one_line(status: Tree, said: str) -> None:
    assert pod_trouble({"status": status}) == said
