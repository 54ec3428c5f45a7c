"""Whether DLRover's operator runs, and its last words if it does not."""

from dataclasses import dataclass

from elastic_gpt.jobs.client import INSTALL_OPERATOR, Cluster, ClusterError
from elastic_gpt.jobs.manifest import Tree
from elastic_gpt.jobs.pods import pod_trouble
from elastic_gpt.jobs.words import line

NAME = "dlrover-controller-manager"
PODS = "control-plane=controller-manager"
# How Go programs say why they end. A usage message or a stack may follow, so it may not be the last line.
LAST_WORDS = ("flag provided but not defined", "unknown flag", "panic:", "fatal error:")


@dataclass(frozen=True)
class Operator:
    namespace: str
    trouble: str
    """One line that says why it does not run; "" if it does."""
    cure: str = ""


def operators(cluster: Cluster) -> list[Operator]:
    """All operators in the cluster. There should be one."""
    return [
        _look(cluster, one)
        for one in cluster.select("Deployment", everywhere=True, fields=f"metadata.name={NAME}")
    ]  # fmt: skip


def _look(cluster: Cluster, deployment: Tree) -> Operator:
    where = deployment["metadata"]["namespace"]
    if deployment.get("status", {}).get("availableReplicas"):
        return Operator(where, "")
    told, last = [], ""
    for pod in cluster.select("Pod", namespace=where, labels=PODS):
        told += [trouble for trouble in [pod_trouble(pod)] if trouble]
        last = last or _last_words(cluster, where, pod)
    told += [f"its last words: {last}"] if last else []
    cure = INSTALL_OPERATOR if LAST_WORDS[0] in last else f"kubectl -n {where} describe pods -l {PODS}"
    return Operator(where, "; ".join([f"{NAME} in namespace {where} is not available", *told]), cure)


def _last_words(cluster: Cluster, namespace: str, pod: Tree) -> str:
    """The last lines of the manager in a pod before it was restarted; "" if it was not."""
    managers = [one for one in pod.get("status", {}).get("containerStatuses") or [] if one["name"] == "manager"]
    if not any(one.get("restartCount") or "terminated" in one.get("state", {}) for one in managers):
        return ""
    for previous in (True, False):
        try:
            entries = cluster.log(
                pod["metadata"]["name"], namespace=namespace, container="manager", previous=previous, tail=200
            )
        except ClusterError:  # no previous log, since the container was not restarted
            continue
        lines = [text for entry in entries if (text := line(entry.partition(" ")[2]))]
        if lines:
            return next((text for text in reversed(lines) if any(word in text for word in LAST_WORDS)), lines[-1])
    return ""
