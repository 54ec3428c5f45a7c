"""A stand-in for Kubeflow Trainer's controller, and for JobSet's and Kubernetes' Job controller below it: pods for TrainJobs.

It makes, of the runtime's template, a pod for each node, with the names, labels and environment that the real ones give; one
that failed is replaced as often as backoffLimit says; and it tells in the TrainJob's conditions how it ended. Pods of this
cluster share one machine's network, so the address of the first one is the loopback.
"""

import contextlib
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kubernetes import client, config

from elastic_gpt.jobs.trainjob import GROUP, NODE
from elastic_gpt.jobs.trainjob_actions import PODS_OF
from tests.cluster.control_plane import free_port

Tree = dict[str, Any]
INDEX = "batch.kubernetes.io/job-completion-index"


class Controller:
    """Reconciles the TrainJobs of all namespaces between `start` and `stop`."""

    def __init__(self, kubeconfig: Path) -> None:
        api = config.new_client_from_config(str(kubeconfig))
        self._core, self._custom = client.CoreV1Api(api), client.CustomObjectsApi(api)
        self._stopped, self._ports = threading.Event(), {}
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(10)

    def _work(self) -> None:
        while not self._stopped.wait(0.2):
            with contextlib.suppress(client.ApiException):  # changed or gone meanwhile: look again
                for job in self._custom.list_cluster_custom_object(GROUP, "v1alpha1", "trainjobs")["items"]:
                    ended = [one["type"] for one in job.get("status", {}).get("conditions", [])]
                    if not ended and "deletionTimestamp" not in job["metadata"]:
                        self._reconcile(job)

    def _reconcile(self, job: Tree) -> None:
        name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
        where = (GROUP, "v1alpha1", namespace)
        runtime = self._custom.get_namespaced_custom_object(
            *where, "trainingruntimes", job["spec"]["runtimeRef"]["name"]
        )
        nodes = job["spec"]["trainer"].get("numNodes", runtime["spec"]["mlPolicy"]["numNodes"])
        [replicated] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
        pods = self._core.list_namespaced_pod(namespace, label_selector=f"{PODS_OF}={name}").items
        failed = sum(pod.status.phase == "Failed" for pod in pods)
        if failed > replicated["template"]["spec"].get("backoffLimit", 6):
            self._end(job, "Failed", "jobset failed due to one or more job failures")
            return
        phases = {pod.metadata.labels[INDEX]: pod.status.phase for pod in pods if pod.status.phase != "Failed"}
        for index in range(nodes):
            if str(index) not in phases:
                pod = self._pod(job, runtime, replicated["template"]["spec"]["template"], nodes, index, len(pods))
                self._core.create_namespaced_pod(namespace, pod)
        if [phases.get(str(index)) for index in range(nodes)] == ["Succeeded"] * nodes:
            self._end(job, "Complete", "jobset completed successfully")

    def _pod(self, job: Tree, runtime: Tree, template: Tree, nodes: int, index: int, number: int) -> Tree:
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        pod: Tree = client.ApiClient().sanitize_for_serialization({"spec": template["spec"]})
        container = next(one for one in pod["spec"]["containers"] if one["name"] == NODE)
        container["args"] = job["spec"]["trainer"].get("args", container.get("args", []))
        if "torch" in runtime["spec"]["mlPolicy"]:
            port = self._ports.setdefault(uid, free_port())
            more = {
                "PET_NNODES": str(nodes),
                "PET_NPROC_PER_NODE": str(job["spec"]["trainer"].get("numProcPerNode", 1)),
                "PET_NODE_RANK": str(index),
                "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": str(port),
                # torchrun knows a node by its name and process id, and pods here have both in common.
                "PET_LOCAL_ADDR": f"127.0.0.{index + 2}",
            }
            container["env"] = [*container["env"], *({"name": key, "value": value} for key, value in more.items())]
        owner = {"apiVersion": job["apiVersion"], "kind": "TrainJob", "name": name, "uid": uid}
        metadata = {
            "name": f"{name}-{NODE}-0-{index}-{number:05x}",
            "labels": {PODS_OF: name, INDEX: str(index)},
            "ownerReferences": [owner],
        }
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}

    def _end(self, job: Tree, how: str, message: str) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        condition = {"type": how, "status": "True", "reason": how, "message": message, "lastTransitionTime": now}
        self._custom.patch_namespaced_custom_object_status(
            GROUP, "v1alpha1", job["metadata"]["namespace"], "trainjobs", job["metadata"]["name"],
            {"status": {"conditions": [condition]}},
        )  # fmt: skip
