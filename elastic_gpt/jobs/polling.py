"""Looking at a job: once, or again and again, and saying what is new."""

import sys
import time
from collections.abc import Iterator

from elastic_gpt.jobs import status as state
from elastic_gpt.jobs.client import Cluster, ClusterError, ForbiddenError, NotFoundError, UnreachableError
from elastic_gpt.jobs.manifest import JOB_LABEL, Tree
from elastic_gpt.jobs.status import JobState
from elastic_gpt.settings import nearest

POLL_SECONDS = 1.0
FIRST_NODES = 4
TIMED_OUT = 124  # the exit code of timeout(1)


def say(text: str) -> None:
    print(text, flush=True)


def fetch(cluster: Cluster, name: str) -> Tree:
    """The ElasticJob. Raises NotFoundError with the nearest name there is."""
    job = cluster.find("ElasticJob", name)
    if job is None:
        names = [one["metadata"]["name"] for one in cluster.select("ElasticJob")]
        near = nearest(name, names) if names else ": there is none here; `elastic-gpt job list -A` looks everywhere"
        raise NotFoundError(f"no job '{name}' in namespace {cluster.namespace}{near}")
    return job


def read(cluster: Cluster, name: str, job: Tree | None = None) -> JobState:
    """A job and its pods, as they are now."""
    job = job or fetch(cluster, name)
    pods = {pod["metadata"]["name"]: pod for label in (state.JOB_NAME, JOB_LABEL)
            for pod in cluster.select("Pod", labels=f"{label}={name}")}  # fmt: skip
    return state.job_state(job, pods.values())


def tails(cluster: Cluster, job: JobState, lines: int = 60) -> dict[str, list[str]]:
    """The ends of the logs of nodes that run, or ran last; one of them is the first worker's, which tells of the world.

    DLRover gives ranks in the order of the nodes', so those of the lowest are enough. A log that cannot be read just now is
    left out.
    """
    found = {}
    running = [node for node in job.nodes if node.phase == "Running"]
    for node in (running or [node for node in job.nodes if node.phase in state.ENDED])[:FIRST_NODES]:
        try:
            found[node.name] = cluster.log(node.name, tail=lines)
        except ForbiddenError:
            raise
        except ClusterError:
            continue
    return found


def looks(cluster: Cluster, name: str, seconds: float | None) -> Iterator[JobState]:
    """The job's state again and again, until the time is over. A server that is away for a while is waited for."""
    end = None if seconds is None else time.monotonic() + seconds
    away = False
    while True:
        try:
            now = read(cluster, name)
            away = False
        except UnreachableError as error:
            if not away:
                say(f"{error} Trying on.")
            away = True
        else:
            yield now
        if end is not None and time.monotonic() >= end:
            return
        time.sleep(POLL_SECONDS)


class Told:
    """Says what is new, once."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    def __call__(self, lines: list[str]) -> None:
        for line in lines:
            if line not in self.said:
                say(line)
        self.said = set(lines)


def late(name: str, timeout: float | None, what: str) -> int:
    """The end of a wait in vain: says so, and returns the exit code."""
    print(f"error: {name}{what} after {timeout:g} s; `elastic-gpt job status {name}` tells more", file=sys.stderr)
    return TIMED_OUT
