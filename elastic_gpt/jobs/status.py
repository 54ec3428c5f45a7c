"""The state of a job, from what the API server says. Pure functions, which ask no server.

DLRover's operator derives a job's phase from events of its master's pod, and is sometimes wrong: it
calls a job Failed though it has just replaced the master, and Running though the job ended while
the operator was away. So the phase counts only together with the pods of the master and the
workers, and how they ended.
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from elastic_gpt.jobs.pods import ALIVE, ENDED, MASTER, Node, pod_node, pod_number
from elastic_gpt.jobs.words import count, line
from elastic_gpt.settings import node_range


@dataclass(frozen=True)
class JobState:
    """The state of a job at one moment."""

    name: str
    namespace: str
    phase: str
    """Suspending, Suspended, New, or the operator's phase, corrected by what the pods show."""
    reason: str
    wanted: int
    """Nodes that the job should have; 0 while suspended."""
    least: int
    most: int
    image: str
    memory: str
    """Memory of each node, as Kubernetes writes it."""
    created: str
    nodes: tuple[Node, ...]
    """Worker pods: the newest of each rank, and older ones that have not ended."""
    others: tuple[Node, ...]
    """The master, and pods for preparing, prompting or mounting the volume."""
    history: tuple[Node, ...]
    """Pods that have ended and have been replaced."""
    masterless_since: str
    """Since when it has no master though it should have one; "" if all is well."""

    @property
    def running(self) -> int:
        return sum(node.phase == "Running" for node in self.nodes)

    @property
    def ended(self) -> bool:
        return self.phase in ENDED

    def headline(self) -> str:
        phase = f"{self.phase}{f' ({self.reason})' if self.reason else ''}"
        if self.ended:
            return phase
        wanted = f"{self.running} of " * bool(self.wanted) + count(self.wanted or self.running, "node")
        return f"{phase}, {wanted} ({self.least} to {self.most} allowed)"

    @property
    def starved(self) -> str:
        """One line, with the cure, about nodes that ran out of memory; "" if there are none."""
        names = [node.name for node in (*self.history, *self.nodes) if node.out_of_memory]
        if not names:
            return ""
        return (
            f"out of memory: {', '.join(names[-3:])}{' and others' * (len(names) > 3)} had {self.memory} each; one that is not"
            f" replaced any more stays away, and {self.name} goes on with fewer: `elastic-gpt job delete {self.name}`, then"
            " submit it with a larger --memory; it goes on from its checkpoint"
        )

    def troubles(self) -> list[str]:
        """What keeps pods from running, and what nodes were lost to that can be cured; one line each."""
        found = [f"{node.name}: {node.phase}: {node.reason}" for node in (*self.others, *self.nodes) if node.reason]
        return [*found, *([self.starved] if self.starved else [])]


def job_state(job: Mapping[str, Any], pods: Iterable[Mapping[str, Any]]) -> JobState:
    """The state of a job.

    Args:
        job: the ElasticJob.
        pods: all of its pods, in any order.
    """
    metadata, spec = job["metadata"], job["spec"]
    worker = spec["replicaSpecs"]["worker"]
    container = worker["template"]["spec"]["containers"][0]
    replicas = int(worker.get("replicas", 1))
    least, most = job_range(job) or (replicas, replicas)
    # Pods that have ended and are being removed do not count: those of a suspended job are there for a moment after `resume`.
    nodes = sorted(
        (node for node in map(pod_node, pods) if node.phase != "Removed"),
        key=lambda node: (node.rank or 0, node.created if node.kind == "prepare" else "", pod_number(node.name)),
    )
    # For each rank, for masters and for prepare pods the newest counts; a shell or a prompt pod replaces no other.
    newest = {(node.kind, node.rank): node.name for node in nodes if node.kind != "other"}
    history = tuple(
        node for node in nodes
        if node.phase in ENDED and node.name != newest.get((node.kind, node.rank), node.name)
    )  # fmt: skip
    present = [node for node in nodes if node not in history]
    workers = tuple(node for node in present if node.kind == "worker")
    masters = [node for node in nodes if node.kind == MASTER]
    phase, reason = judge(job, workers, masters)
    masterless = phase not in ENDED and not spec.get("suspend") and not any(one.phase in ALIVE for one in masters)
    if phase == "Suspended":
        workers = tuple(node for node in workers if node.phase not in ENDED)
    return JobState(
        name=metadata["name"],
        namespace=metadata["namespace"],
        phase=phase,
        reason=reason,
        wanted=wanted_nodes(job),
        least=least,
        most=most,
        image=container.get("image", ""),
        memory=container.get("resources", {}).get("limits", {}).get("memory", ""),
        created=metadata.get("creationTimestamp", ""),
        nodes=workers,
        others=tuple(node for node in present if node.kind != "worker"),
        history=history,
        masterless_since=_last_change(job, masters) if masterless else "",
    )


def judge(job: Mapping[str, Any], workers: Iterable[Node], masters: list[Node]) -> tuple[str, str]:
    """The phase of a job, and the reason if there is one.

    Args:
        job: the ElasticJob.
        workers: the newest pod of each rank, and older ones that have not ended.
        masters: all master pods, the newest last.
    """
    told = str(job.get("status", {}).get("phase") or "New")
    workers, suspended = list(workers), bool(job["spec"].get("suspend"))
    master = masters[-1] if masters else None
    led = any(one.phase in ALIVE for one in masters)
    trains = any(one.phase in ALIVE for one in workers)
    operator = f"DLRover's operator says {told}"
    # A master that ends its job says why; the operator only knows its exit code.
    why = (master.last_word if master and master.phase == "Failed" else "") or failure(job)
    finished = not suspended and bool(workers) and all(one.phase == "Succeeded" for one in workers)
    if told == "Succeeded" or finished:
        return "Succeeded", "" if told in ("Succeeded", "Running") else f"all of its workers have; {operator}"
    if told == "Failed" and not led and not (masters_were_miscounted(job) and (trains or suspended)):
        return "Failed", why
    if not (led or trains or suspended) and master and master.phase == "Succeeded":
        return "Succeeded", f"its master has; {operator}"
    if not (led or suspended) and master and master.exit_code == 1:
        return "Failed", f"{master.last_word or 'its master ended with exit code 1'}; {operator}"
    if suspended:
        return ("Suspending" if any(one.phase not in ENDED for one in workers) else "Suspended"), ""
    if told == "Failed":
        return "Running", f"{operator}{f': {why}' * bool(why)}, but " + ("its master runs" if led else "it trains on")
    return told, "DLRover's operator has not taken it up yet" if told == "New" else ""


def masters_were_miscounted(job: Mapping[str, Any]) -> bool:
    """Whether the operator called a job Failed for losses of its master that restartCount allows.

    After making a master it takes restartCount for 0 until it next reads the job.
    """
    match = re.search(r"failover count (-?\d+) is beyond", failure(job))
    return match is not None and int(match[1]) <= int(
        job["spec"]["replicaSpecs"].get(MASTER, {}).get("restartCount") or 0
    )


def _last_change(job: Mapping[str, Any], masters: Iterable[Node]) -> str:
    """The time when the job was made, its phase changed, or a master ended: the latest of these."""
    conditions = job.get("status", {}).get("status", {}).get("conditions") or []
    times = [job["metadata"].get("creationTimestamp"), *(one.get("lastTransitionTime") for one in conditions)]
    return max([time for time in (*times, *(one.ended for one in masters)) if time], default="")


def job_range(job: Mapping[str, Any]) -> tuple[int, int] | None:
    """The least and the most nodes of an ElasticJob, from its --nnodes; None if the job is not one of ours."""
    container = job["spec"]["replicaSpecs"]["worker"]["template"]["spec"]["containers"][0]
    words = [*container.get("command", []), *container.get("args", []), ""]
    for word, following in itertools.pairwise(words):
        flag, _, value = word.partition("=")
        if flag == "--nnodes":
            return node_range(value or following)
    return None


def wanted_nodes(job: Mapping[str, Any]) -> int:
    """How many nodes an ElasticJob wants: its replicas, within the range of its --nnodes; 0 while suspended."""
    if job["spec"].get("suspend"):
        return 0
    replicas = int(job["spec"]["replicaSpecs"]["worker"].get("replicas", 1))
    least, most = job_range(job) or (replicas, replicas)
    return min(max(replicas, least), most)


def failure(job: Mapping[str, Any]) -> str:
    """The reason for which DLRover's operator calls a job Failed."""
    conditions = job.get("status", {}).get("status", {}).get("conditions") or []
    return next((line(one.get("message", "")).rstrip(".") for one in conditions if one["type"] == "Failed"), "")


@dataclass(frozen=True)
class Event:
    """An event of Kubernetes."""

    time: str
    about: str
    warning: bool
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.about}: {self.reason}: {self.message}"


def job_events(name: str, volume: str, events: Iterable[Mapping[str, Any]]) -> list[Event]:
    """The events about a job, its pods and its volume, the oldest first."""
    about = re.compile(
        rf"({re.escape(name)}|{re.escape(name)}-(prepare|prompt|shell|edljob)(-.*)?|elasticjob-{re.escape(name)}-dlrover-master-\d+"
        rf"|{re.escape(volume)})"
    )
    found = [
        Event(
            time=one.get("lastTimestamp") or one.get("eventTime") or one["metadata"].get("creationTimestamp") or "",
            about=one["involvedObject"]["name"],
            warning=one.get("type") == "Warning",
            reason=one.get("reason", ""),
            message=line(one.get("message", "")),
        )
        for one in events
        if about.fullmatch(one.get("involvedObject", {}).get("name", ""))
    ]
    return sorted(found, key=lambda one: one.time.rstrip("Z"))  # some times have fractions of a second
