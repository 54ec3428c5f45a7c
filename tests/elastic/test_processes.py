"""processes.py: no process outlives its parent, and those of a job's nodes are found."""

import os
import signal
import subprocess
import sys

from tests.conftest import PATIENCE, until

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
