"""What the API server told -> what became of a job, in words. Pure functions; nothing here asks a server."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from elastic_gpt.settings import node_range

JOB_NAME = "elasticjob.dlrover/name"  # labels of the pods that DLRover makes
REPLICA_TYPE = "elasticjob.dlrover/replica-type"
ENDED = ("Succeeded", "Failed")

_STEP = re.compile(
    r"step (?P<step>\d+)/(?P<steps>\d+) · loss (?P<loss>\S+)(?: · val (?P<val>\S+))? · (?P<speed>[\d,]+) tokens/s"
    r".*? · (?P<workers>\d+) workers(?: · (?P<left>\S+) left)?"
)
_BATCH = re.compile(r"batch: .* on each of (?P<workers>\d+) workers")


@dataclass(frozen=True)
class Progress:
    """The last line that training wrote of itself."""

    time: str
    """As the cluster wrote it, RFC 3339."""
    step: int
    steps: int
    loss: float
    tokens_per_second: int
    workers: int
    """In the world that did this step."""
    left: str
    """Hours, minutes and seconds to the end, as training estimates it."""

    def __str__(self) -> str:
        return (
            f"step {self.step:,}/{self.steps:,} · loss {self.loss:.4f} · {self.tokens_per_second:,} tokens/s"
            f" · {count(self.workers, 'worker')}{f' · {self.left} left' if self.left else ''}"
        )


@dataclass(frozen=True)
class Node:
    """A pod of a job."""

    name: str
    kind: str
    """worker, dlrover-master, prepare or other."""
    rank: int | None
    """Of a worker: a replacement has its predecessor's."""
    phase: str
    """Pending, Running, Leaving, Succeeded or Failed."""
    reason: str
    """Why it does not run; empty where there is nothing to say."""
    restarts: int
    """How many predecessors it replaces."""
    host: str
    created: str


@dataclass(frozen=True)
class JobState:
    """A job at one moment."""

    name: str
    namespace: str
    phase: str
    """What DLRover's operator says, or Suspending, Suspended or New where it says less than there is to know."""
    reason: str
    wanted: int
    """Nodes; 0 while suspended."""
    least: int
    most: int
    image: str
    created: str
    nodes: tuple[Node, ...]
    """Workers, of each rank the newest, and older ones that have not ended."""
    others: tuple[Node, ...]
    """The master, and pods that prepare, prompt or hold the volume."""

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

    def troubles(self) -> list[str]:
        """What keeps pods from running, a line each."""
        return [f"{node.name}: {node.phase}: {node.reason}" for node in (*self.others, *self.nodes) if node.reason]


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
    nodes = sorted(map(pod_node, pods), key=lambda node: (node.rank or 0, _number(node.name)))
    newest = {node.rank: node.name for node in nodes if node.kind == "worker"}
    workers = tuple(
        node for node in nodes
        if node.kind == "worker" and (node.name == newest[node.rank] or node.phase not in ENDED)
    )  # fmt: skip
    phase = str(job.get("status", {}).get("phase") or "New")
    reason = ""
    if phase == "Failed":
        reason = failure(job)
    elif phase == "New":
        reason = "DLRover's operator has not taken it up yet"
    if spec.get("suspend") and phase not in ENDED:
        reason = ""
        phase = "Suspended" if all(node.phase in ENDED for node in workers) else "Suspending"
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
        created=metadata.get("creationTimestamp", ""),
        nodes=workers,
        others=tuple(node for node in nodes if node.kind != "worker"),
    )


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


def pod_node(pod: Mapping[str, Any]) -> Node:
    metadata = pod["metadata"]
    labels = metadata.get("labels", {})
    kind = labels.get(REPLICA_TYPE) or ("prepare" if "-prepare-" in metadata["name"] else "other")
    phase = pod.get("status", {}).get("phase", "Pending")
    return Node(
        name=metadata["name"],
        kind=kind,
        rank=int(labels["elasticjob.dlrover/rank-index"]) if kind == "worker" else None,
        phase="Leaving" if metadata.get("deletionTimestamp") and phase not in ENDED else phase,
        reason=pod_trouble(pod),
        restarts=int(labels.get("elasticjob.dlrover/relaunch-count", 0)),
        host=pod["spec"].get("nodeName", ""),
        created=metadata.get("creationTimestamp", ""),
    )


def pod_trouble(pod: Mapping[str, Any]) -> str:
    """Why a pod does not run, or how it failed: in one line, empty if nothing is the matter."""
    status = pod.get("status", {})
    phase = status.get("phase", "Pending")
    if phase in ("Running", "Succeeded"):
        return ""
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"{condition.get('reason', 'Unschedulable')}: {line(condition.get('message', ''))}"
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
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


def progress(logs: Mapping[str, Sequence[str]]) -> Progress | None:
    """The newest progress in the ends of the workers' logs; only the first worker of a world writes any.

    Args:
        logs: of each pod, lines with their time in front.
    """
    found = [one for lines in logs.values() for entry in lines if (one := parse_progress(entry))]
    return max(found, key=lambda one: one.time, default=None)


def parse_progress(entry: str) -> Progress | None:
    """A line that training writes every `observe.interval` steps, its time in front; None for any other line."""
    time, _, text = entry.partition(" ")
    match = _STEP.search(text)
    if not match:
        return None
    return Progress(
        time=time,
        step=int(match["step"]),
        steps=int(match["steps"]),
        loss=float(match["loss"]),
        tokens_per_second=int(match["speed"].replace(",", "")),
        workers=int(match["workers"]),
        left=match["left"] or "",
    )


def world(logs: Mapping[str, Sequence[str]]) -> tuple[str, int] | None:
    """Time and number of workers of the newest world that said how large it is."""
    found = []
    for lines in logs.values():
        for entry in lines:
            time, _, text = entry.partition(" ")
            if match := _STEP.search(text) or _BATCH.search(text):
                found.append((time, int(match["workers"])))
    return max(found, default=None)


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


def age(since: str, now: datetime | None = None) -> str:
    """How long ago, in one unit: 12s, 5m, 3h, 2d. Empty where it is not known."""
    if not since:
        return ""
    seconds = ((now or datetime.now(UTC)) - datetime.fromisoformat(since)).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds / length)}{unit}"
    return f"{max(0, int(seconds))}s"


def count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def line(text: object) -> str:
    return " ".join(str(text).split())


def _number(name: str) -> int:
    tail = name.rpartition("-")[2]
    return int(tail) if tail.isdecimal() else 0
