"""The logs of all of a job's pods in one stream, a pod's name in front of each line."""

import queue
import threading
import time

from elastic_gpt.contract import Progress
from elastic_gpt.jobs import polling
from elastic_gpt.jobs.client import Cluster, ClusterError, NotFoundError, UnreachableError
from elastic_gpt.jobs.pods import ENDED, Node
from elastic_gpt.jobs.status import JobState

KINDS = {"workers": "worker", "master": "dlrover-master", "prepare": "prepare"}
AGAIN_SECONDS = 2.0


def logs(cluster: Cluster, name: str, *, of: str, tail: int | None, follow: bool) -> int:
    """Print all logs. With `follow`, go on until the job has ended, also with the logs of new pods."""
    if follow:
        return _follow(cluster, name, of, tail)
    entries = []
    for node in _pods(polling.read(cluster, name), of):
        try:
            entries += [(_time(entry), short(node), entry) for entry in cluster.log(node.name, tail=tail)]
        except NotFoundError:
            continue  # it has just been replaced
        except ClusterError as error:
            entries.append(("", short(node), f" ({error})"))
    for _, who, entry in sorted(entries, key=lambda entry: entry[0]):
        _print(who, entry)
    if not entries:
        polling.say(f"{name}: nothing has been written yet; `elastic-gpt job status {name}` tells why")
    return 0


def short(node: Node) -> str:
    """A short name: worker-3 for elastic-gpt-edljob-worker-3. Other pods keep their names."""
    return (
        "prepare" if node.kind == "prepare" else f"{node.kind.removeprefix('dlrover-')}-{node.name.rpartition('-')[2]}"
    )


def _pods(job: JobState, of: str) -> list[Node]:
    """The pods of a job, including replaced ones, whose logs say how they ended."""
    return [node for node in (*job.history, *job.others, *job.nodes) if of == "all" or node.kind == KINDS[of]]


def _follow(cluster: Cluster, name: str, of: str, tail: int | None) -> int:
    lines: queue.Queue[tuple[str, str]] = queue.Queue()
    threads: dict[str, threading.Thread] = {}
    ended, looked = False, 0.0
    while True:
        if not ended and time.monotonic() - looked > AGAIN_SECONDS:
            looked = time.monotonic()
            try:
                job = polling.read(cluster, name)
            except UnreachableError:
                continue  # the pod has just gone
            for node in _pods(job, of):
                if node.name not in threads and node.phase != "Pending":
                    # The log of a new pod is read from its beginning.
                    first = None if threads else tail
                    threads[node.name] = threading.Thread(
                        target=_pass_on, args=(cluster, node, first, lines), name=node.name, daemon=True
                    )
                    threads[node.name].start()
            ended = job.ended
        try:
            _print(*lines.get(timeout=0.2))
        except queue.Empty:
            if ended and not any(thread.is_alive() for thread in threads.values()):
                polling.say(f"{name}: {job.headline()}")
                return 0


def _pass_on(cluster: Cluster, node: Node, tail: int | None, lines: "queue.Queue[tuple[str, str]]") -> None:
    """Read a pod's log to its end. If the connection breaks, go on from the last line."""
    last = ""
    while True:
        try:
            for entry in cluster.follow(node.name, since=last, tail=tail):
                if _time(entry) > last:  # after a break, the first lines were printed already
                    last = _time(entry)
                    lines.put((short(node), entry))
            phase = cluster.get("Pod", node.name).get("status", {}).get("phase")
        except NotFoundError:
            return
        except ClusterError:
            phase = ""  # it has not started yet, or the server is away
        if phase in ENDED:
            return
        time.sleep(AGAIN_SECONDS)


def _time(entry: str) -> str:
    return entry.partition(" ")[0]


def _print(who: str, entry: str) -> None:
    if Progress.from_line(entry) is None:  # lines for programs are left out; the same is there for people
        polling.say(f"{who} | {entry.partition(' ')[2]}")
