"""Talks to a job's model, which runs in a pod of its own, through this terminal."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable

from elastic_gpt.jobs import manifest, polling, status
from elastic_gpt.jobs.client import Cluster, ClusterError
from elastic_gpt.jobs.model import using
from elastic_gpt.jobs.pods import ENDED, pod_trouble
from elastic_gpt.jobs.polling import Told, fetch, late, say


def prompt(cluster: Cluster, name: str, *, timeout: float, terminal: Callable[[Cluster, str], int]) -> int:
    """Start the prompt pod, wait for it, and connect it with `terminal`. Delete the pod when the person leaves."""
    [tree] = using(fetch(cluster, name), manifest.prompt)
    pod = tree["metadata"]["name"]
    there = cluster.find("Pod", pod)
    if there and there.get("status", {}).get("phase") in ENDED:
        cluster.delete("Pod", pod)
        there = None
        _until_gone(cluster, pod, timeout)
    if not there:
        cluster.create(tree)
    tell, end = Told(), time.monotonic() + timeout
    while time.monotonic() < end:
        now = cluster.get("Pod", pod)
        phase = now.get("status", {}).get("phase")
        if phase == "Running":
            code = terminal(cluster, pod)
            cluster.delete("Pod", pod)
            return code
        if phase in ENDED:
            for entry in cluster.log(pod, tail=5):
                say(entry.partition(" ")[2])
            raise ClusterError(f"pod {pod} has ended before anything was asked; its last lines are above")
        trouble = pod_trouble(now)
        tell([f"{pod}: Pending{f': {trouble}' if trouble else ''}", *_warnings(cluster, pod)])
        time.sleep(polling.POLL_SECONDS)
    return late(name, timeout, "'s prompt pod does not run")


def _until_gone(cluster: Cluster, pod: str, timeout: float) -> None:
    end = time.monotonic() + timeout
    while cluster.find("Pod", pod) and time.monotonic() < end:
        time.sleep(polling.POLL_SECONDS)


def _warnings(cluster: Cluster, pod: str) -> list[str]:
    found = status.job_events(pod, "", cluster.select("Event"))
    return [f"{pod}: {one.reason}: {one.message}" for one in found if one.warning]


def attach(cluster: Cluster, pod: str) -> int:
    """Connect this terminal with the pod: by kubectl if it is installed, else over the API."""
    say("the prompt appears when the model is loaded; `exit` leaves")
    if kubectl := shutil.which("kubectl"):
        command = [
            kubectl,
            "--namespace",
            cluster.namespace,
            *cluster.kubectl_flags,
            "attach",
            pod,
            "--container=prompt",
        ]
        return subprocess.run([*command, "-it" if sys.stdin.isatty() else "-i"], check=False).returncode
    from elastic_gpt.jobs.terminal import pass_through

    return pass_through(cluster.attach(pod, "prompt"))
