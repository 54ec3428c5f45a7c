"""Shows a job while it runs: a live table on a terminal, elsewhere a line for each change."""

import contextlib
import math
import sys
from datetime import UTC, datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from elastic_gpt.contract import Progress
from elastic_gpt.jobs import polling, status
from elastic_gpt.jobs.client import Cluster, ClusterError
from elastic_gpt.jobs.pods import JOB_NAME
from elastic_gpt.jobs.progress import words
from elastic_gpt.jobs.status import Event, JobState
from elastic_gpt.jobs.words import age

EVENTS = 5
SLOW = "slow: each step waits for it"
COLORS = {"Running": "green", "Succeeded": "green", "Failed": "red", "Pending": "yellow", "Leaving": "yellow"}


def show(cluster: Cluster, name: str) -> int:
    """Print the job's state now."""
    job, progress, events = look(cluster, name)
    _console().print(picture(job, progress, events))
    return 0


def watch(cluster: Cluster, name: str) -> int:
    """Show the job until it has ended, or Ctrl-C. Returns the job's exit code."""
    if not sys.stdout.isatty():
        return _lines(cluster, name)
    job: JobState | None = None
    with Live(console=Console(highlight=False), auto_refresh=False) as live:
        for job in polling.poll(cluster, name, None):
            _, progress, events = look(cluster, name, job)
            live.update(picture(job, progress, events), refresh=True)
            if job.ended:
                break
    return 0 if job and job.phase == "Succeeded" else 1


def _lines(cluster: Cluster, name: str) -> int:
    tell, told = polling.Told(), ""
    for job in polling.poll(cluster, name, None):
        _, progress, events = look(cluster, name, job)
        tell([job.headline(), *job.troubles(), *(str(event) for event in events if event.warning)])
        if progress and words(progress) != told:
            told = words(progress)
            polling.say(told)
        if job.ended:
            return 0 if job.phase == "Succeeded" else 1
    return 1


def look(cluster: Cluster, name: str, job: JobState | None = None) -> tuple[JobState, Progress | None, list[Event]]:
    """Read all that can be shown. Leaves out what this user may not read, or cannot read now."""
    job = job or polling.read(cluster, name)
    progress, events = None, []
    with contextlib.suppress(ClusterError):
        progress = polling.progress(cluster, job)
    with contextlib.suppress(ClusterError):
        events = status.job_events(name, "", cluster.select("Event"))[-EVENTS:]
    return job, progress, events


def picture(job: JobState, progress: Progress | None, events: list[Event]) -> RenderableType:
    """The job as a table of its pods, with a line above and the last events below."""
    table = Table(
        "pod", "rank", "phase", "restarts", "machine", "age", "", box=None, pad_edge=False, header_style="bold"
    )
    for node in (*job.others, *job.nodes):
        slow = progress is not None and node.name in progress.slow
        table.add_row(
            node.name,
            "" if node.rank is None else str(node.rank),
            Text(node.phase, COLORS.get(node.phase, "")),
            str(node.restarts or ""),
            node.host,
            age(node.created),
            Text(node.reason or SLOW * slow, "red" if node.phase == "Failed" else "yellow"),
        )
    head = Text.assemble((job.name, "bold"), f" in {job.namespace}: {job.headline()}, {age(job.created)} old")
    going = [f"{words(progress)}{since(progress)}"] if progress else []
    if job.running and (not progress or progress.loss is None):
        going.append("its nodes have not reported a step yet")
    going += [job.starved] if job.starved else []
    happened = [
        Text(f"{age(event.time):>4} {event}", "yellow" if event.warning else "", overflow="ellipsis", no_wrap=True)
        for event in events
    ]
    return Group(head, *map(Text, going), "", table, *([""] if happened else []), *happened)


def since(progress: Progress) -> str:
    """How long ago the progress was, in brackets; "" if its time is not plausible."""
    try:
        return f" ({age(datetime.fromtimestamp(progress.time or math.nan, UTC).isoformat())} ago)"
    except (ValueError, OverflowError, OSError):
        return ""


def jobs(cluster: Cluster, *, everywhere: bool) -> int:
    """Print a line for each job."""
    found = cluster.select("ElasticJob", everywhere=everywhere)
    if not found:
        where = "in this cluster" if everywhere else f"in namespace {cluster.namespace}; -A looks in all"
        polling.say(f"no jobs {where}; `elastic-gpt job submit` makes one")
        return 0
    pods = cluster.select("Pod", labels=JOB_NAME, everywhere=everywhere)
    table = Table(
        *(["namespace"] * everywhere), "job", "phase", "nodes", "range", "image", "age", box=None, pad_edge=False
    )
    for tree in found:
        name, namespace = tree["metadata"]["name"], tree["metadata"]["namespace"]
        of = [pod for pod in pods if pod["metadata"]["namespace"] == namespace
              and pod["metadata"]["labels"][JOB_NAME] == name]  # fmt: skip
        job = status.job_state(tree, of)
        table.add_row(
            *([namespace] * everywhere), name, Text(job.phase, COLORS.get(job.phase, "")),
            f"{job.running}/{job.wanted}", f"{job.least}:{job.most}", job.image, age(job.created),
        )  # fmt: skip
    _console().print(table)
    return 0


def _console() -> Console:
    """A console as wide as the terminal. Elsewhere lines are not wrapped, so that they can be searched."""
    return Console(width=None if sys.stdout.isatty() else 2000, highlight=False)
