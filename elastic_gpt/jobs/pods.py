"""Describes a pod of a job: what it is for, how it runs or how it ended. Pure functions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from elastic_gpt.jobs.words import line

JOB_NAME = "elasticjob.dlrover/name"  # labels of the pods that DLRover makes
REPLICA_TYPE = "elasticjob.dlrover/replica-type"
MASTER = "dlrover-master"
ENDED = ("Succeeded", "Failed")
ALIVE = ("Pending", "Running")


@dataclass(frozen=True)
class Node:
    """A pod of a job."""

    name: str
    kind: str
    """What it is for: worker, dlrover-master, prepare or other."""
    rank: int | None
    """Rank of a worker, which a replacement keeps; None for others."""
    phase: str
    """Pending, Running, Leaving, Succeeded or Failed."""
    reason: str
    """Why it does not run; "" if there is nothing to say."""
    restarts: int
    """How many pods were there before it in its place."""
    host: str
    created: str
    ended: str = ""
    """When its container ended; "" if it has not, or it is not known."""
    exit_code: int | None = None
    last_word: str = ""
    """Its termination message."""
    out_of_memory: bool = False


def pod_node(pod: Mapping[str, Any]) -> Node:
    """Describes a pod. The phase of one that has ended and is being deleted is Removed."""
    metadata = pod["metadata"]
    labels = metadata.get("labels", {})
    kind = labels.get(REPLICA_TYPE) or ("prepare" if "-prepare-" in metadata["name"] else "other")
    phase = pod.get("status", {}).get("phase", "Pending")
    if metadata.get("deletionTimestamp"):
        phase = "Removed" if phase in ENDED else "Leaving"
    # For masters, the operator only numbers their names.
    restarts = (
        pod_number(metadata["name"]) if kind == MASTER else int(labels.get("elasticjob.dlrover/relaunch-count", 0))
    )
    ended = next(_ended(pod), {})
    return Node(
        name=metadata["name"],
        kind=kind,
        rank=int(labels["elasticjob.dlrover/rank-index"]) if kind == "worker" else None,
        phase=phase,
        reason=pod_trouble(pod),
        restarts=restarts,
        host=pod["spec"].get("nodeName", ""),
        created=metadata.get("creationTimestamp", ""),
        ended=ended.get("finishedAt", ""),
        exit_code=ended.get("exitCode"),
        last_word=line(ended.get("message", "")).removeprefix("error: "),
        out_of_memory=any(one.get("reason") == "OOMKilled" for one in _ended(pod)),
    )


def _ended(pod: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The states of the containers of a pod that have ended. None if the pod was lost with its machine."""
    for container in pod.get("status", {}).get("containerStatuses") or []:
        if ended := container.get("state", {}).get("terminated"):
            yield ended


def pod_trouble(pod: Mapping[str, Any]) -> str:
    """One line that says why a pod does not run or how it failed; "" if all is well."""
    status = pod.get("status", {})
    phase = status.get("phase", "Pending")
    containers = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    if phase == "Running":  # at least one of its containers runs; another one may fail again and again
        containers = [
            one for one in containers if "CrashLoop" in one.get("state", {}).get("waiting", {}).get("reason", "")
        ]
    if phase == "Succeeded":
        return ""
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"{condition.get('reason', 'Unschedulable')}: {line(condition.get('message', ''))}"
    for container in containers:
        state = container.get("state", {})
        if ended := state.get("terminated"):
            if ended.get("exitCode"):
                why = ended.get("reason", "")
                code = f"exit code {ended['exitCode']}"
                return f"{code} (OOMKilled: more --memory)" if why == "OOMKilled" else code
        elif waiting := state.get("waiting"):
            why = waiting.get("reason", "")
            if why not in ("", "PodInitializing", "ContainerCreating"):
                return f"{why}: {line(waiting.get('message', ''))}".rstrip(": ")
        elif container["name"] == "wait-for-data":
            return "waits for the data that `prepare` makes"
    return line(f"{status.get('reason', '')} {status.get('message', '')}") if phase == "Failed" else ""


def pod_number(name: str) -> int:
    """The number at the end of a pod's name; 0 if there is none."""
    tail = name.rpartition("-")[2]
    return int(tail) if tail.isdecimal() else 0
