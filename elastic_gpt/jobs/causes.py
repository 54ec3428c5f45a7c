"""Finds out why a job has no master and what to do, since neither its pods nor DLRover's operator say so."""

import contextlib
from collections.abc import Iterator

from elastic_gpt.jobs import status
from elastic_gpt.jobs.client import INSTALL_OPERATOR, Cluster, ClusterError, quantity
from elastic_gpt.jobs.manifest import MASTER_NEEDS, Tree
from elastic_gpt.jobs.operator import operators
from elastic_gpt.jobs.pods import MASTER
from elastic_gpt.jobs.status import JobState
from elastic_gpt.jobs.words import age


def why_no_master(cluster: Cluster, job: JobState) -> str:
    """The reason and the cure in one line. Ignores what this user may not read."""
    again = (
        f"`elastic-gpt job delete {job.name}`, which waits until all of it is gone, then submit it again; it goes on from its"
        " checkpoint"
    )
    return f"no master for {age(job.masterless_since)}: " + (
        _operator(cluster, again) or _elsewhere(cluster, job) or _refused(cluster, job, again) or _missed(job, again)
    )


def _operator(cluster: Cluster, again: str) -> str:
    with contextlib.suppress(ClusterError):
        found = operators(cluster)
        if not found:
            return f"DLRover's operator is not in this cluster: {INSTALL_OPERATOR}; then {again}"
        for one in found:
            if one.trouble:
                return f"DLRover's operator does not run: {one.trouble}: {one.cure}; then {again}"
    return ""


def _elsewhere(cluster: Cluster, job: JobState) -> str:
    with contextlib.suppress(ClusterError):
        if others := same_name_elsewhere(cluster, job.name, job.namespace):
            return (
                f"namespace {others[0]} has a job of this name, and DLRover's operator tells jobs apart by their names alone:"
                f" `elastic-gpt job delete {job.name} -n {job.namespace}`, then submit it under another name"
            )
    return ""


def same_name_elsewhere(cluster: Cluster, name: str, namespace: str) -> list[str]:
    """Other namespaces with a job of this name. Raises ForbiddenError if this user may not list jobs in all of them."""
    jobs = cluster.select("ElasticJob", everywhere=True, fields=f"metadata.name={name}")
    return sorted({one["metadata"]["namespace"] for one in jobs} - {namespace})


def _refused(cluster: Cluster, job: JobState, again: str) -> str:
    """Why the API server refused the master: from an event, if the operator may write any, else a quota that is used up."""
    with contextlib.suppress(ClusterError):
        events = status.job_events(job.name, "", cluster.select("Event"))
        for event in reversed(events):
            if event.about == job.name and event.warning and "creat" in event.message:
                return f"{event.message}: make room, then {again}"
    with contextlib.suppress(ClusterError):
        full = [told for quota in cluster.select("ResourceQuota") for told in _full(quota)]
        if full:
            return f"{full[0]}: make room, then {again}"
    return ""


def _full(quota: Tree) -> Iterator[str]:
    """The resources of which a quota has too little left for a master."""
    status = quota.get("status", {})
    for what, hard in (status.get("hard") or {}).items():
        needed = {"pods": "1", "count/pods": "1"} | MASTER_NEEDS
        used = (status.get("used") or {}).get(what, "0")
        if quantity(hard) - quantity(used) < quantity(needed.get(what.rpartition(".")[2], "0")):
            yield f"quota {quota['metadata']['name']} allows {hard} of {what}, of which {used} are used"


def _missed(job: JobState, again: str) -> str:
    if lost := [node for node in (*job.history, *job.others) if node.kind == MASTER]:
        return f"{lost[-1].name} has ended, and DLRover's operator did not see it (it was away) or cannot read how: {again}"
    return (
        "DLRover's operator made none and does not try again; it was refused one (a quota), or a job of this name was deleted"
        f" and made anew before the old one's pods were gone: {again}"
    )
