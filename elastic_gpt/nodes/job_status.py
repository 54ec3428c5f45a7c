"""Corrects the status of an ElasticJob whose master was lost. Pure functions.

DLRover's operator 0.6.1 looks at the pod of a new master before it has read the job again. It then
believes that the job allows no restart, and calls it Failed, though the new master comes and
training goes on. The next loss of a master would end the job. A job that failed for any other
reason, or after more losses than its `restartCount`, stays Failed.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from elastic_gpt.jobs.pods import MASTER
from elastic_gpt.jobs.status import failure, masters_were_miscounted

_BEYOND = re.compile(r"failover count (\d+) is beyond")


def healed(job: Mapping[str, Any]) -> dict[str, Any] | None:
    """A merge patch that makes the status of `job` that of a running job; None if its status is right."""
    status = job.get("status", {})
    lost = _BEYOND.search(failure(job))
    if status.get("phase") != "Failed" or not lost or not masters_were_miscounted(job):
        return None
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    running = {
        "type": "Running",
        "status": "True",
        "reason": "JobRunning",
        "message": f"The job runs under another master, after {lost[1]} that were lost.",
        "lastUpdateTime": now,
        "lastTransitionTime": now,
    }
    # The operator makes no other master while it counts one as active, and adds no condition behind a failure.
    kept = [one for one in status["status"]["conditions"] if one["type"] not in ("Failed", "Running")]
    counts = {"initial": 0, "pending": 0, "active": 1, "succeeded": 0, "failed": int(lost[1])}
    return {
        "status": {
            "phase": "Running",
            "status": {"conditions": [*kept, running], "replicaStatuses": {MASTER: counts}},
        }
    }
