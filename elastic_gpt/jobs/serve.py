"""Serves a job's model over HTTP, from a Deployment with a Service in front."""

import time

from elastic_gpt.jobs import manifest, polling
from elastic_gpt.jobs.client import Cluster, ExistsError
from elastic_gpt.jobs.manifest import SERVE_LABEL
from elastic_gpt.jobs.model import using
from elastic_gpt.jobs.pods import pod_trouble
from elastic_gpt.jobs.polling import Told, fetch, late, say


def serve(cluster: Cluster, name: str, *, timeout: float, wait: bool) -> int:
    """Make or update the Deployment and the Service, and wait until the model answers."""
    for tree in using(fetch(cluster, name), manifest.serve):
        kind, called = tree["kind"], tree["metadata"]["name"]
        try:
            cluster.create(tree)
            say(f"{kind.lower()}/{called} created")
        except ExistsError:
            cluster.patch(kind, called, {"spec": tree["spec"]})
            say(f"{kind.lower()}/{called} configured")
    if wait and not _until_ready(cluster, name, called, timeout):
        return late(name, timeout, "'s server is not ready")
    namespace = " ".join(["kubectl", *cluster.kubectl_flags, "-n", cluster.namespace])
    say(f"inside the cluster: http://{called}.{cluster.namespace}/")
    say(f"here, with a page:   {namespace} port-forward service/{called} 8080:80, then http://localhost:8080/")
    return 0


def _until_ready(cluster: Cluster, name: str, called: str, timeout: float) -> bool:
    end, tell = time.monotonic() + timeout, Told()
    while True:
        now = cluster.get("Deployment", called)
        status = now.get("status", {})
        seen = status.get("observedGeneration", 0) >= now["metadata"].get("generation", 0)
        if seen and status.get("updatedReplicas", 0) and status.get("availableReplicas", 0):
            return True
        if time.monotonic() >= end:
            return False
        pods = cluster.select("Pod", labels=f"{SERVE_LABEL}={name}")
        troubles = {pod["metadata"]["name"]: pod_trouble(pod) for pod in pods}
        tell(
            [f"{pod}: {trouble}" for pod, trouble in troubles.items() if trouble]
            or [f"{called}: waiting for the model"]
        )
        time.sleep(polling.POLL_SECONDS)
