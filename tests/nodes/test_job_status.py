"""job_status.py: how a master corrects a status that calls its job Failed. tests/cluster does it under the operator."""

from typing import Any

import pytest

from elastic_gpt.nodes.job_status import healed

BEYOND = "The job master failover count {} is beyond the restart count 0."


def failed(message: str, *, phase: str = "Failed", restarts: int = 100) -> dict[str, Any]:
    conditions = [
        {"type": "Created", "status": "True", "message": "created"},
        {"type": "Running", "status": "False", "message": "ran"},
        {"type": "Failed", "status": "True", "message": message},
    ]
    counts = {"dlrover-master": {"pending": 1, "active": -1, "failed": 1}}
    return {
        "spec": {"replicaSpecs": {"dlrover-master": {"restartCount": restarts}}},
        "status": {"phase": phase, "status": {"conditions": conditions, "replicaStatuses": counts}},
    }


@pytest.mark.parametrize("lost", [1, 3, 100])
def test_a_job_that_failed_by_lost_masters_within_its_restart_count_runs(lost: int) -> None:
    patch = healed(failed(BEYOND.format(lost)))
    assert patch is not None
    status = patch["status"]
    assert status["phase"] == "Running"
    # What the operator counts: one that runs, and none of those that it saw come or go.
    counts = {"initial": 0, "pending": 0, "active": 1, "succeeded": 0, "failed": lost}
    assert status["status"]["replicaStatuses"] == {"dlrover-master": counts}
    conditions = status["status"]["conditions"]
    assert [(one["type"], one["status"]) for one in conditions] == [("Created", "True"), ("Running", "True")]


@pytest.mark.parametrize(
    "job",
    [
        failed(BEYOND.format(101)),
        failed(BEYOND.format(1), restarts=0),
        failed("The job master gpt-dlrover-master-0 failed with exitcode=1."),
        failed(BEYOND.format(1), phase="Succeeded"),
        {"spec": {"replicaSpecs": {}}, "status": {"phase": "Failed"}},
        {"spec": {"replicaSpecs": {}}},
    ],
)
def test_a_job_that_has_really_failed_stays_so(job: dict[str, Any]) -> None:
    assert healed(job) is None
