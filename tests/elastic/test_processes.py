"""processes.py: no process outlives its parent, and those of a job's nodes are found."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys

from elastic_gpt.processes import of_nodes
from tests.conftest import PATIENCE, environment, until

CHILD = """
import os, sys, time
from elastic_gpt.processes import die_with_parent
die_with_parent(int(sys.argv[1]))
print("up", flush=True)
time.sleep(60)
"""


PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def test_a_worker_dies_with_its_agent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    until(lambda: not alive(child), "the worker outlived its agent")


def test_a_worker_whose_agent_died_before_it_could_say_so_ends_at_once() -> None:
    orphan = subprocess.run([sys.executable, "-c", CHILD, "1"], capture_output=True, timeout=PATIENCE, check=False)
    assert orphan.returncode == -signal.SIGKILL


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_jobs_processes_are_found_by_their_nodes_names_orphans_too_and_the_dead_are_not() -> None:
    job = f"egpt-{secrets.token_hex(8)}"
    living = {}
    for node in (f"{job}-node-0", f"{job}-node-11", f"{job}2-node-0"):  # the last one is of another job
        shell = "sleep 600 >&- & echo $!"  # it ends, and leaves an orphan
        made = subprocess.run(["sh", "-c", shell], env=environment(POD_NAME=node), stdout=subprocess.PIPE, check=True)
        living[int(made.stdout)] = node
    try:
        first, *_, other = living
        assert of_nodes(job) == {pid: node for pid, node in living.items() if pid != other}
        os.kill(first, signal.SIGKILL)
        until(lambda: first not in of_nodes(job))
        assert len(of_nodes(job)) == 1
    finally:
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
