"""Actions on a job that runs as Kubeflow's TrainJobs (trainjob.py): submit, status, wait, delete."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elastic_gpt.jobs import manifest, polling, trainjob
from elastic_gpt.jobs.actions import covers, make, pod_claim
from elastic_gpt.jobs.client import Cluster, ClusterError, NotFoundError
from elastic_gpt.jobs.manifest import Tree
from elastic_gpt.jobs.pods import Node, pod_node
from elastic_gpt.jobs.polling import Told, again, late, say
from elastic_gpt.jobs.spec import JobSpec
from elastic_gpt.jobs.words import count
from elastic_gpt.settings import nearest

PODS_OF = "jobset.sigs.k8s.io/jobset-name"  # label of a JobSet's pods; the JobSet has the name of its TrainJob
ASKED = "--as trainjob"


@dataclass(frozen=True)
class Step:
    """The state of a TrainJob at one moment."""

    name: str
    phase: str
    """Complete, Failed or Suspended by its conditions, else Running or Pending by its pods."""
    reason: str
    pods: tuple[Node, ...]

    @property
    def ended(self) -> bool:
        return self.phase in ("Complete", "Failed")

    def headline(self) -> str:
        phase = f"{self.name}: {self.phase}{f' ({self.reason})' if self.reason else ''}"
        running = sum(pod.phase == "Running" for pod in self.pods)
        return phase if self.ended else f"{phase}, {count(running, 'pod')} running"

    def troubles(self) -> list[str]:
        return [] if self.ended else [f"{pod.name}: {pod.phase}: {pod.reason}" for pod in self.pods if pod.reason]


def step_state(tree: Tree, pods: Sequence[Tree]) -> Step:
    """The state of a TrainJob. `pods`: the pods of its JobSet. A pure function."""
    conditions = {one["type"]: one for one in tree.get("status", {}).get("conditions") or [] if one["status"] == "True"}
    nodes = tuple(sorted(map(pod_node, pods), key=lambda node: node.name))
    # A TrainJob that is suspended while it fails has both conditions.
    phase = next((name for name in ("Failed", "Complete", "Suspended") if name in conditions), "")
    if not phase:
        phase = "Running" if any(node.phase == "Running" for node in nodes) else "Pending"
    told = conditions.get(phase, {})
    return Step(tree["metadata"]["name"], phase, str(told.get("message", "")) * (phase == "Failed"), nodes)


def submit(cluster: Cluster, spec: JobSpec, parts: Sequence[str], *, dry_run: bool) -> int:
    """Make the objects of these parts that do not exist yet."""
    trees = [tree for part in trainjob.PARTS if part in parts for tree in trainjob.PARTS[part](spec)]
    make(cluster, trees, spec.namespace, dry_run=dry_run, keep=_keep)
    if not dry_run:
        say(f"wait for it: elastic-gpt job wait {spec.name} {ASKED} -n {spec.namespace}")
    return 0


def show(cluster: Cluster, name: str) -> int:
    """Print each TrainJob of the job, and its pods."""
    for step in _steps(cluster, name):
        print(step.headline())
        for pod in step.pods:
            print(
                f"  {pod.name}: {pod.phase}{f': {pod.reason}' if pod.reason else ''}{f', on {pod.host}' * bool(pod.host)}"
            )
    return 0


def wait(cluster: Cluster, name: str, *, timeout: float | None) -> int:
    """Wait until all TrainJobs of the job are Complete, except the prompt, which waits for a person.

    Returns 0 if they are, 1 if one has Failed, 124 if the time is over.
    """
    tell = Told()
    prompt = trainjob.named(name, "generative-prompt")
    for steps in again(lambda: _steps(cluster, name), timeout):
        awaited = [step for step in steps if step.name != prompt]
        tell([line for step in awaited for line in (step.headline(), *step.troubles())])
        if any(step.phase == "Failed" for step in awaited):
            return 1
        if all(step.ended for step in awaited):
            return 0
    return late(name, timeout, " has not ended", ASKED)


def delete(cluster: Cluster, name: str, *, volume: bool, timeout: float, wait: bool) -> int:
    """Delete the job's TrainJobs, runtimes and text, and wait until no pod is left. `volume`: delete that as well."""
    names = [trainjob.named(name, step) for step in trainjob.STEPS]
    claim = next(filter(None, (_claim(cluster.find("TrainingRuntime", trainjob.runtime_of(one))) for one in names)), "")
    if volume and not claim and _steps(cluster, name):
        raise ClusterError(f"job {name} has no volume: leave --volume out; its run stays on the object store")
    made = [("TrainJob", one) for one in names] + [("TrainingRuntime", trainjob.runtime_of(one)) for one in names]
    made += [("ConfigMap", f"{name}-text")] + [("PersistentVolumeClaim", claim)] * volume
    gone = [f"{kind.lower()}/{one}" for kind, one in made if cluster.delete(kind, one)]
    if not gone:
        _steps(cluster, name)
    for one in gone:
        say(f"{one} deleted")
    if claim and not volume:
        say(f"volume {claim} stays, and on it the run")
    end, tell = time.monotonic() + timeout, Told()
    while wait and (left := [pod["metadata"]["name"] for one in names for pod in _pods(cluster, one)]):
        tell([f"{name}: waiting until {', '.join(left)} {'are' if len(left) > 1 else 'is'} gone"])
        if time.monotonic() >= end:
            return late(name, timeout, " is deleted, but pods of it are there still", ASKED)
        time.sleep(polling.POLL_SECONDS)
    return 0


def _steps(cluster: Cluster, name: str) -> list[Step]:
    """The job's TrainJobs, in order. Raises NotFoundError with the nearest name that exists."""
    named = [trainjob.named(name, step) for step in trainjob.STEPS]
    found = [step_state(tree, _pods(cluster, one)) for one in named if (tree := cluster.find("TrainJob", one))]
    if not found:
        jobs = {one["metadata"].get("labels", {}).get(manifest.JOB_LABEL, "") for one in cluster.select("TrainJob")}
        near = nearest(name, sorted(jobs - {""})) if jobs - {""} else ": there is none here"
        raise NotFoundError(f"no TrainJobs of job '{name}' in namespace {cluster.namespace}{near}")
    return found


def _pods(cluster: Cluster, name: str) -> list[Tree]:
    return cluster.select("Pod", labels=f"{PODS_OF}={name}")


def _keep(cluster: Cluster, tree: Tree, *, dry_run: bool) -> str:  # noqa: ARG001
    """Handle an object that exists already. Raises ClusterError if it differs, or has ended."""
    kind, name = tree["kind"], tree["metadata"]["name"]
    if kind in ("Namespace", "PersistentVolumeClaim"):
        return "unchanged"  # shared by jobs, and perhaps the cluster administrator's
    there = cluster.get(kind, name)
    job = tree["metadata"]["labels"][manifest.JOB_LABEL]
    cure = f"`elastic-gpt job delete {job} {ASKED}` first; the volume stays, and the same name goes on from it"
    wanted = {key: value for key, value in tree.items() if key in ("spec", "data")}
    if not covers(there, wanted):
        raise ClusterError(f"{kind} {name} is there with other settings: {cure}")
    step = step_state(there, []) if kind == "TrainJob" else None
    if step and (step.phase == "Failed" or (step.ended and step.name != trainjob.named(job, "load-corpus"))):
        raise ClusterError(f"TrainJob {name} is there and has ended ({step.phase}): {cure}")
    return "unchanged"


def _claim(runtime: Tree | None) -> str:
    """Name of the PersistentVolumeClaim of a TrainingRuntime's pods; "" if there is none."""
    jobs: list[Any] = runtime["spec"]["template"]["spec"]["replicatedJobs"] if runtime else []
    return next(filter(None, (pod_claim(job["template"]["spec"]["template"]["spec"]) for job in jobs)), "")
