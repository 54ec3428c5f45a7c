"""Reads the state of a job, once or repeatedly, and prints what is new."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from elastic_gpt.contract import Progress
from elastic_gpt.jobs import status
from elastic_gpt.jobs.causes import why_no_master
from elastic_gpt.jobs.client import Cluster, ClusterError, ForbiddenError, NotFoundError, UnreachableError
from elastic_gpt.jobs.manifest import JOB_LABEL, Tree
from elastic_gpt.jobs.pods import ENDED, JOB_NAME, MASTER
from elastic_gpt.jobs.progress import newest
from elastic_gpt.jobs.status import JobState
from elastic_gpt.jobs.words import seconds_since
from elastic_gpt.settings import nearest
from prepare.frontdoor import TIMED_OUT as TIMED_OUT

T = TypeVar("T")
POLL_SECONDS = 1.0
MASTER_SECONDS = 20.0  # after so long, DLRover's operator should have made a master; it takes 1 s
FEW = 4
TAILS = (200, 20_000)  # lines to read; tracebacks of all workers may follow the last progress


def say(text: str) -> None:
    print(text, flush=True)


def fetch(cluster: Cluster, name: str) -> Tree:
    """The ElasticJob `name`. Raises NotFoundError with the nearest name that exists."""
    job = cluster.find("ElasticJob", name)
    if job is None:
        names = [one["metadata"]["name"] for one in cluster.select("ElasticJob")]
        near = nearest(name, names) if names else ": there is none here; `elastic-gpt job list -A` looks everywhere"
        raise NotFoundError(f"no job '{name}' in namespace {cluster.namespace}{near}")
    return job


def read(cluster: Cluster, name: str, job: Tree | None = None) -> JobState:
    """The state of a job and its pods now. Also finds out why it has no master, if it should have one."""
    job = job or fetch(cluster, name)
    pods = {pod["metadata"]["name"]: pod for label in (JOB_NAME, JOB_LABEL)
            for pod in cluster.select("Pod", labels=f"{label}={name}")}  # fmt: skip
    state = status.job_state(job, pods.values())
    if state.masterless_since and seconds_since(state.masterless_since) > MASTER_SECONDS:
        told = f"{state.reason}: " * bool(state.reason)
        return dataclasses.replace(state, reason=f"{told}{why_no_master(cluster, state)}")
    return state


def progress(cluster: Cluster, job: JobState) -> Progress | None:
    """How far training is, from the logs of the master and of workers, including pods that have ended."""
    workers = [node for node in (*job.nodes, *job.history) if node.kind == "worker"]
    masters = [node for node in (*job.history, *job.others) if node.kind == MASTER]
    running = [node for node in workers if node.phase not in ENDED]
    ended = sorted((node for node in workers if node.phase in ENDED), key=lambda node: node.ended or node.created)
    # DLRover orders ranks by node, so the first worker, which writes progress, is on one of the lowest nodes.
    logs = [*masters[-FEW:], *running[:FEW], *ended[-FEW:]]
    for tail in TAILS:
        lines = [line for node in logs for line in _log(cluster, node.name, tail)]
        if found := newest(lines):
            return found
    return None


def _log(cluster: Cluster, pod: str, tail: int) -> list[str]:
    """The last lines of a pod's log; [] if it cannot be read now."""
    try:
        return cluster.log(pod, tail=tail)
    except ForbiddenError:
        raise
    except ClusterError:
        return []


def poll(cluster: Cluster, name: str, seconds: float | None) -> Iterator[JobState]:
    """Yields the job's state repeatedly until the time is over. Waits while the server is away."""
    return again(lambda: read(cluster, name), seconds)


def again(look: Callable[[], T], seconds: float | None) -> Iterator[T]:
    """Yields the result of `look` repeatedly until the time is over. Waits while the server is away."""
    end = None if seconds is None else time.monotonic() + seconds
    reached = away = False
    while True:
        try:
            now = look()
            reached, away = True, False
        except UnreachableError as error:
            if not reached:  # the address may be wrong, so do not wait
                raise
            if not away:
                say(f"{error} Trying on.")
            away = True
        else:
            yield now
        if end is not None and time.monotonic() >= end:
            return
        time.sleep(POLL_SECONDS)


class Told:
    """Prints lines, but each one only once."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    def __call__(self, lines: list[str]) -> None:
        for line in lines:
            if line not in self.said:
                say(line)
        self.said = set(lines)


def late(name: str, timeout: float | None, what: str, how: str = "") -> int:
    """Print that the time is over and return the exit code. `how`: further flags of `job status` for the message."""
    look = f"elastic-gpt job status {name}{f' {how}' * bool(how)}"
    print(f"error: {name}{what} after {timeout:g} s; `{look}` tells more", file=sys.stderr)
    return TIMED_OUT
