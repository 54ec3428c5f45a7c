"""DLRover's operator: whether it runs, and its last words where it does not."""

from dataclasses import dataclass

from elastic_gpt.jobs.client import INSTALL_OPERATOR, Cluster, ClusterError
from elastic_gpt.jobs.manifest import Tree
from elastic_gpt.jobs.pods import pod_trouble
from elastic_gpt.jobs.words import line

NAME = "dlrover-controller-manager"
PODS = "control-plane=controller-manager"
# How Go programs say why they end; usage or a stack may follow, so the last line of the log need not be the one.
LAST_WORDS = ("flag provided but not defined", "unknown flag", "panic:", "fatal error:")


@dataclass(frozen=True)
class Operator:
    namespace: str
    trouble: str
    """Why it does not run, in one line; empty where it does."""
    cure: str = ""


def operators(cluster: Cluster) -> list[Operator]:
    """All that the cluster has; one is right."""
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
    """What the manager in a pod wrote last, before it was started again; empty where it has not ended yet."""
    managers = [one for one in pod.get("status", {}).get("containerStatuses") or [] if one["name"] == "manager"]
    if not any(one.get("restartCount") or "terminated" in one.get("state", {}) for one in managers):
        return ""
    for previous in (True, False):
        try:
            entries = cluster.log(
                pod["metadata"]["name"], namespace=namespace, container="manager", previous=previous, tail=200
            )
        except ClusterError:  # of a container that was not started again there is no previous one
            continue
        lines = [text for entry in entries if (text := line(entry.partition(" ")[2]))]
        if lines:
            return next((text for text in reversed(lines) if any(word in text for word in LAST_WORDS)), lines[-1])
    return ""
