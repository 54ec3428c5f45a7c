"""DLRover's operator 0.6.1 as a state machine: events of jobs and master pods in, phases and masters to make out.

Read in its Go code (go/elasticjob: main.go and pkg/controllers) and seen of its binary. Its faults are all here, for what we
promise is promised under it: jobs are cached by name alone; masters are counted by events, so that a missed or foreign one
leaves a counter at -1 or too high; the spec that a master was made from says `restartCount` 0 until the next reconcile; there
is no second try from Created; and a Failed pod that does not say how it ended is its own end. Nothing here asks a server.
"""

import copy
from typing import Any

MASTER = "dlrover-master"
COUNTERS = {"Pending": "pending", "Running": "active", "Succeeded": "succeeded", "Failed": "failed"}
Manifest = dict[str, Any]


class Panic(RuntimeError):
    """The operator's process has crashed; Kubernetes starts another one, which knows nothing of what this one had seen."""


class StateMachine:
    """Jobs and pods are as the API server gives them, in JSON."""

    def __init__(self) -> None:
        self.cached: dict[str, Manifest] = {}  # by name: the operator knows no namespaces here

    def reconcile(self, job: Manifest) -> tuple[Manifest, int | None]:
        """The job with the status that it has now, and the index of the master that is to be made, if one is."""
        name = job["metadata"]["name"]
        job = {**copy.deepcopy(job), "status": self.cached.get(name, copy.deepcopy(job)).get("status") or {}}
        if "deletionTimestamp" in job["metadata"]:
            return job, None
        self.cached[name] = job
        suspended = bool(job["spec"].get("suspend"))
        match job["status"].get("phase", ""):
            case "":
                job["status"]["status"] = {"conditions": [], "replicaStatuses": {MASTER: _none()}}
                if suspended:
                    _set_phase(job, "Suspended", "JobSuspended", f"ElasticJob {name} is suspended.")
                    del self.cached[name]
                else:
                    _set_phase(job, "Created", "JobCreated", f"ElasticJob {name} is created.")
                return job, self._make_master(job)
            case "Pending" | "Running":
                masters = job["status"].get("status", {}).get("replicaStatuses", {}).get(MASTER)
                if masters is None:
                    raise Panic(f"{name} runs and has no count of masters")
                if masters["initial"] + masters["pending"] + masters["active"] == 0:
                    return job, self._make_master(job)
            case "Succeeded" | "Failed":
                del self.cached[name]
            case "Suspended" if not suspended:
                _set_phase(job, "Running", "JobRunning", f"ElasticJob {name} is unspended.")
        return job, None

    def job_deleted(self, job: Manifest) -> None:
        self.cached.pop(job["metadata"]["name"], None)

    def pod_created(self, pod: Manifest) -> None:
        if job := self._owner(pod):
            _count(job, pod, +1)

    def pod_updated(self, old: Manifest, new: Manifest) -> None:
        if _phase(old) in ("Succeeded", "Failed"):
            return
        if job := self._owner(new):
            _count(job, new, +1)
            _count(job, old, -1)
            _judge(job, new)

    def pod_deleted(self, pod: Manifest) -> None:
        job = self._owner(pod)
        if job is None:
            return
        if _phase(pod) in ("Pending", "Running"):
            _count(job, pod, -1)
            _masters(job)["failed"] += 1
        _judge(job, pod)

    def _owner(self, pod: Manifest) -> Manifest | None:
        """The cached job of this name: it may be another one, or one that has been deleted and applied again."""
        return self.cached.get(pod["metadata"]["ownerReferences"][0]["name"])

    def _make_master(self, job: Manifest) -> int:
        template = job["spec"]["replicaSpecs"][MASTER]["template"]
        job["spec"]["replicaSpecs"][MASTER] = {"template": template}  # and no restartCount, until the job is read again
        counts = _masters(job)
        return counts["initial"] + counts["pending"] + counts["active"] + counts["failed"]


def _none() -> dict[str, int]:
    return dict.fromkeys(("initial", "pending", "active", "succeeded", "failed"), 0)


def _masters(job: Manifest) -> dict[str, int]:
    status = job["status"].setdefault("status", {})
    counts: dict[str, int] = status.setdefault("replicaStatuses", {}).setdefault(MASTER, {})
    for name, number in _none().items():  # the server leaves out what is 0
        counts.setdefault(name, number)
    return counts


def _phase(pod: Manifest) -> str:
    return str(pod.get("status", {}).get("phase", ""))


def _count(job: Manifest, pod: Manifest, number: int) -> None:
    if counter := COUNTERS.get(_phase(pod)):
        _masters(job)[counter] += number


def _judge(job: Manifest, pod: Manifest) -> None:
    """The phase of a job, from one of its masters."""
    failed, restarts = _masters(job)["failed"], job["spec"]["replicaSpecs"].get(MASTER, {}).get("restartCount", 0)
    if failed > restarts:
        beyond = f"The job master failover count {failed} is beyond the restart count {restarts}."
        _set_phase(job, "Failed", "JobFailed", beyond)
    elif _phase(pod) == "Pending":
        job["status"]["phase"] = "Pending"
    elif _phase(pod) == "Failed":
        containers = pod["status"].get("containerStatuses") or [{}]
        ended = containers[0].get("state", {}).get("terminated")
        if ended is None:
            raise Panic(f"{pod['metadata']['name']} is Failed and does not say how it ended")
        if ended["exitCode"] == 1:
            told = f"The job master {pod['metadata']['name']} failed with exitcode=1."
            _set_phase(job, "Failed", "JobFailed", told)
        else:
            _set_phase(job, "Running", "JobRestarting", "The job master is failover.")
    elif _phase(pod) == "Succeeded":
        _set_phase(job, "Succeeded", "JobSucceeded", "The job master is succeeded.")
    elif job["spec"].get("suspend"):
        _set_phase(job, "Suspended", "JobSuspended", "The job master is suspended.")
    else:
        _set_phase(job, "Running", "JobRunning", "The job master is running.")


def _set_phase(job: Manifest, phase: str, reason: str, message: str) -> None:
    """A condition for the phase; those of a job that has Failed once never change."""
    job["status"]["phase"] = phase
    status = job["status"].setdefault("status", {})
    conditions = status.get("conditions") or []
    if any((one["type"], one["status"]) == ("Failed", "True") for one in conditions):
        return
    if any((one["type"], one["reason"]) == (phase, reason) for one in conditions):
        return
    ended = phase in ("Succeeded", "Failed")
    kept = [
        {**one, "status": "False"} if ended and one["type"] == "Running" else one
        for one in conditions
        if one["type"] != phase
    ]
    status["conditions"] = [*kept, {"type": phase, "status": "True", "reason": reason, "message": message}]


def master_pod(job: Manifest, index: int) -> Manifest:
    """Labels and annotations of the job are the master's too."""
    meta, template = job["metadata"], copy.deepcopy(job["spec"]["replicaSpecs"][MASTER]["template"])
    first = template["spec"]["containers"][0]
    pod_ip = {"name": "POD_IP", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "status.podIP"}}}
    first["env"] = [*first.get("env", []), pod_ip]
    given = template.get("metadata", {})
    return {
        "metadata": {
            "name": f"elasticjob-{meta['name']}-{MASTER}-{index}",
            "labels": given.get("labels", {})
            | _name_labels(job)
            | meta.get("labels", {})
            | {"elasticjob.dlrover/replica-type": MASTER, "elasticjob.dlrover/replica-index": str(index)},
            "annotations": given.get("annotations", {}) | meta.get("annotations", {}),
            "ownerReferences": [_owner_reference(job)],
        },
        "spec": template["spec"],
    }


def master_service(job: Manifest) -> Manifest:
    """It has an address of its own (ClusterIP), and finds the master of this name."""
    labels = {"elasticjob.dlrover/replica-type": MASTER} | _name_labels(job)
    name = f"elasticjob-{job['metadata']['name']}-{MASTER}"
    return {
        "metadata": {"name": name, "labels": labels, "ownerReferences": [_owner_reference(job)]},
        "spec": {"type": "ClusterIP", "selector": labels, "ports": [{"port": 50001}]},
    }


def _name_labels(job: Manifest) -> dict[str, str]:
    return {"app.kubernetes.io/name": "elasticjob", "elasticjob.dlrover/name": job["metadata"]["name"]}


def _owner_reference(job: Manifest) -> Manifest:
    return {
        "apiVersion": "elastic.iml.github.io/v1alpha1",
        "kind": "ElasticJob",
        "name": job["metadata"]["name"],
        "uid": job["metadata"]["uid"],
        "blockOwnerDeletion": True,
        "controller": True,
    }
