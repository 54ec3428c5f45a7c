"""What the API server told -> what became of a job, in words. Pure functions; nothing here asks a server.

DLRover's operator derives a job's phase from events of its master's pod, and errs: it calls a job
failed whose master it has just replaced, and running one that ended while the operator was away. So
the phase is one witness among others: the master, the workers, and how they ended.
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
    """A job at one moment."""

    name: str
    namespace: str
    phase: str
    """Suspending, Suspended or New where DLRover's operator says less than there is to know; else what it says, where the pods
    do not say better."""
    reason: str
    wanted: int
    """Nodes; 0 while suspended."""
    least: int
    most: int
    image: str
    memory: str
    """Of each node, as Kubernetes writes it."""
    created: str
    nodes: tuple[Node, ...]
    """Workers, of each rank the newest, and older ones that have not ended."""
    others: tuple[Node, ...]
    """The master, and pods that prepare, prompt or hold the volume."""
    history: tuple[Node, ...]
    """Pods that have ended and were replaced."""
    masterless_since: str
    """Since when it has no master and should have one; empty otherwise."""

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
        """What memory cost this job, in one line with the cure; empty where it had enough."""
        names = [node.name for node in (*self.history, *self.nodes) if node.out_of_memory]
        if not names:
            return ""
        return (
            f"out of memory: {', '.join(names[-3:])}{' and others' * (len(names) > 3)} had {self.memory} each; one that is not"
            f" replaced any more stays away, and {self.name} goes on with fewer: `elastic-gpt job delete {self.name}`, then"
            " submit it with a larger --memory; it goes on from its checkpoint"
        )

    def troubles(self) -> list[str]:
        """What keeps pods from running, a line each, and what cost it nodes that can be cured."""
        found = [f"{node.name}: {node.phase}: {node.reason}" for node in (*self.others, *self.nodes) if node.reason]
        return [*found, *([self.starved] if self.starved else [])]


def job_state(job: Mapping[str, Any], pods: Iterable[Mapping[str, Any]]) -> JobState:
    """Args:
    job: the ElasticJob.
    pods: all of its pods, in any order.
    """
    metadata, spec = job["metadata"], job["spec"]
    worker = spec["replicaSpecs"]["worker"]
    container = worker["template"]["spec"]["containers"][0]
    replicas = int(worker.get("replicas", 1))
    least, most = job_range(job) or (replicas, replicas)
    # A pod that has ended and is being removed tells nothing: of a suspended job it would be there for a moment after `resume`.
    nodes = sorted(
        (node for node in map(pod_node, pods) if node.phase != "Removed"),
        key=lambda node: (node.rank or 0, node.created if node.kind == "prepare" else "", pod_number(node.name)),
    )
    # Of each rank, of masters and of prepare pods, the last one counts; a shell and a prompt replace nobody.
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
    """The phase of a job and, where there is something to say, why.

    Args:
        workers: of each rank the newest, and older ones that have not ended.
        masters: all there are, the newest last.
    """
    told = str(job.get("status", {}).get("phase") or "New")
    workers, suspended = list(workers), bool(job["spec"].get("suspend"))
    master = masters[-1] if masters else None
    led = any(one.phase in ALIVE for one in masters)
    trains = any(one.phase in ALIVE for one in workers)
    operator = f"DLRover's operator says {told}"
    # A master that ends its job says why; the operator knows its exit code alone.
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
    """Whether the operator failed a job for losses of its master that restartCount allows.

    When it makes a master it forgets the restartCount until it next looks at the job, and takes it
    for 0.
    """
    match = re.search(r"failover count (-?\d+) is beyond", failure(job))
    return match is not None and int(match[1]) <= int(
        job["spec"]["replicaSpecs"].get(MASTER, {}).get("restartCount") or 0
    )


def _last_change(job: Mapping[str, Any], masters: Iterable[Node]) -> str:
    """When a job was made, its phase changed or a master of it ended, whichever came last."""
    conditions = job.get("status", {}).get("status", {}).get("conditions") or []
    times = [job["metadata"].get("creationTimestamp"), *(one.get("lastTransitionTime") for one in conditions)]
    return max([time for time in (*times, *(one.ended for one in masters)) if time], default="")


def job_range(job: Mapping[str, Any]) -> tuple[int, int] | None:
    """The least and the most nodes of an ElasticJob, from its --nnodes; None for a job that is not ours."""
    container = job["spec"]["replicaSpecs"]["worker"]["template"]["spec"]["containers"][0]
    words = [*container.get("command", []), *container.get("args", []), ""]
    for word, following in itertools.pairwise(words):
        flag, _, value = word.partition("=")
        if flag == "--nnodes":
            return node_range(value or following)
    return None


def wanted_nodes(job: Mapping[str, Any]) -> int:
    """How many nodes an ElasticJob asks for: its replicas, between the least and most of its --nnodes; 0 while suspended."""
    if job["spec"].get("suspend"):
        return 0
    replicas = int(job["spec"]["replicaSpecs"]["worker"].get("replicas", 1))
    least, most = job_range(job) or (replicas, replicas)
    return min(max(replicas, least), most)


def failure(job: Mapping[str, Any]) -> str:
    """Why DLRover's operator calls a job failed."""
    conditions = job.get("status", {}).get("status", {}).get("conditions") or []
    return next((line(one.get("message", "")).rstrip(".") for one in conditions if one["type"] == "Failed"), "")


@dataclass(frozen=True)
class Event:
    """Something that happened, as Kubernetes tells it."""

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
    return sorted(found, key=lambda one: one.time.rstrip("Z"))  # some have fractions of a second
