"""A stand-in for DLRover's Go operator 0.6.1, which is in no package: what its reconciler does, in the order it does it.

Read in go/elasticjob/pkg/controllers of DLRover: a new ElasticJob gets a master pod (also one that is created suspended) and
a service; the master's end is the job's end (0: Succeeded, 1: Failed); a master that ends otherwise, or is deleted, is made
again, as often as its restartCount says; a suspended job only changes its phase, and gets no new master until it is resumed.
Worker pods are the master's business.
"""

import contextlib
import sys
import threading
from typing import Any

from kubernetes import client

GROUP, VERSION, PLURAL = "elastic.iml.github.io", "v1alpha1", "elasticjobs"
MASTER = "dlrover-master"
POLL_SECONDS = 0.3


class Operator:
    """Reconciles the ElasticJobs of all namespaces until closed; while `away`, none."""

    def __init__(self, api: client.ApiClient) -> None:
        self._core, self._custom = client.CoreV1Api(api), client.CustomObjectsApi(api)
        self._failed: dict[str, set[str]] = {}  # job uid to uids of masters that failed or were deleted
        self._seen: dict[str, dict[str, str]] = {}  # job uid to master uid to phase
        self._stopped, self.away = threading.Event(), False
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            with contextlib.suppress(client.ApiException):
                for job in self._custom.list_cluster_custom_object(GROUP, VERSION, PLURAL)["items"]:
                    if self.away:
                        break
                    try:
                        self._reconcile(job)
                    except client.ApiException as error:  # tried again, as controllers do
                        print(f"operator: {error.status} {error.body}", file=sys.stderr)

    def _reconcile(self, job: dict[str, Any]) -> None:
        meta, spec = job["metadata"], job["spec"]
        if "deletionTimestamp" in meta:
            return
        phase = job.get("status", {}).get("phase", "")
        suspended = bool(spec.get("suspend"))
        if phase in ("Succeeded", "Failed"):
            return
        if phase == "":
            self._make_master(job, 0)
            self._set_phase(job, "Suspended" if suspended else "Created")
            return
        uid = meta["uid"]
        label = f"elasticjob.dlrover/name={meta['name']},elasticjob.dlrover/replica-type={MASTER}"
        masters = self._core.list_namespaced_pod(meta["namespace"], label_selector=label).items
        phases = {pod.metadata.uid: pod.status.phase for pod in masters}
        before = self._seen.get(uid, {})
        failed = self._failed.setdefault(uid, set())
        failed |= {pod for pod, state in phases.items() if state == "Failed"}
        failed |= {pod for pod, state in before.items() if pod not in phases and state != "Succeeded"}
        changed = phases != before
        self._seen[uid] = phases

        if changed:
            restarts = spec["replicaSpecs"].get(MASTER, {}).get("restartCount", 0)
            codes = [
                pod.status.container_statuses[0].state.terminated.exit_code
                for pod in masters
                if pod.status.phase == "Failed" and pod.status.container_statuses[0].state.terminated
            ]
            if len(failed) > restarts:
                beyond = f"The job master failover count {len(failed)} is beyond the restart count {restarts}."
                self._set_phase(job, "Failed", beyond)
                return
            if 1 in codes:
                self._set_phase(job, "Failed", "The job master failed with exitcode=1.")
                return
            if "Succeeded" in phases.values():
                self._set_phase(job, "Succeeded")
                return
            self._set_phase(job, "Suspended" if suspended else "Running")
        elif phase == "Suspended" and not suspended:
            self._set_phase(job, "Running")
        alive = [state for state in phases.values() if state in ("Pending", "Running")]
        if not alive and not suspended:
            self._make_master(job, len(failed))

    def _set_phase(self, job: dict[str, Any], phase: str, message: str = "") -> None:
        meta = job["metadata"]
        conditions = [{"type": phase, "status": "True", "message": message or f"The job is {phase}."}]
        status = {"phase": phase, "status": {"conditions": conditions, "replicaStatuses": {MASTER: {}}}}
        self._custom.patch_namespaced_custom_object_status(
            GROUP, VERSION, meta["namespace"], PLURAL, meta["name"], {"status": status}
        )

    def _make_master(self, job: dict[str, Any], index: int) -> None:
        meta = job["metadata"]
        owner = {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "ElasticJob",
            "name": meta["name"],
            "uid": meta["uid"],
            "blockOwnerDeletion": True,
            "controller": True,
        }
        labels = {"elasticjob.dlrover/name": meta["name"], "elasticjob.dlrover/replica-type": MASTER}
        template = job["spec"]["replicaSpecs"][MASTER]["template"]
        pod_ip = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
        first, *others = template["spec"]["containers"]
        pod = {
            "metadata": {
                "name": f"elasticjob-{meta['name']}-{MASTER}-{index}",
                "labels": {
                    **template.get("metadata", {}).get("labels", {}),
                    **labels,
                    "app.kubernetes.io/name": "elasticjob",
                    "elasticjob.dlrover/replica-index": str(index),
                },
                "ownerReferences": [owner],
            },
            "spec": {**template["spec"], "containers": [{**first, "env": [*first.get("env", []), pod_ip]}, *others]},
        }
        service = {
            "metadata": {"name": f"elasticjob-{meta['name']}-{MASTER}", "ownerReferences": [owner]},
            "spec": {"clusterIP": "None", "selector": labels, "ports": [{"port": 50001, "targetPort": 50001}]},
        }
        for create, body in (
            (self._core.create_namespaced_pod, pod),
            (self._core.create_namespaced_service, service),
        ):
            try:
                create(meta["namespace"], body)
            except client.ApiException as error:
                if error.status != 409:  # it is there
                    raise
