"""The standby: a worker that is forked from it behaves, to its agent, as one that the agent started itself."""

import os
import secrets
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_gpt import standby
from tests.elastic.test_world import alive

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the standby needs Linux")

ROOM = """
import os, signal, sys, time
import torch
asked = []
def main(arguments, prog):
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: asked.append(number))
    print(prog, arguments, os.environ["COLOUR"], os.getcwd(), os.getpid(), torch.get_num_threads())
    print("to standard error", file=sys.stderr)
    if arguments[0] == "raise":
        raise RuntimeError("of its own")
    if arguments[0] == "wait":
        while len(asked) < 2:
            time.sleep(0.01)
        print(sorted(asked), flush=True)
    return int(arguments[-1])
"""


@pytest.fixture
def name(tmp_path: Path) -> Iterator[str]:
    """A running standby's name."""
    (tmp_path / "room.py").write_text(textwrap.dedent(ROOM))
    name = f"test-{secrets.token_hex(8)}"
    code = f"import sys; sys.path.insert(0, '{tmp_path}'); from elastic_gpt.standby import serve\n"
    code += f"serve({name!r}, ['room'], {os.getpid()})"
    server = subprocess.Popen([sys.executable, "-c", code])
    yield name
    server.kill()
    server.wait()


def client(name: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", standby.__file__, name, "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | {"COLOUR": "red", "OMP_NUM_THREADS": "1"},
    )


def test_a_worker_has_its_own_arguments_environment_folder_streams_and_exit_code(name: str, tmp_path: Path) -> None:
    for code in ("0", "3"):
        process = client(name, tmp_path, "go", code)
        output, errors = process.communicate(timeout=60)
        assert output.startswith(f"elastic-gpt train ['go', '{code}'] red {tmp_path} ")
        assert output.endswith(" 1\n")  # the threads of its environment, not of the standby's
        assert errors == "to standard error\n"
        assert process.returncode == int(code)


def test_an_exception_is_a_traceback_and_exit_code_1(name: str, tmp_path: Path) -> None:
    process = client(name, tmp_path, "raise")
    assert "RuntimeError: of its own" in process.communicate(timeout=60)[1]
    assert process.returncode == 1


def waiting(name: str, folder: Path) -> tuple[subprocess.Popen[str], int]:
    process = client(name, folder, "wait", "0")
    assert process.stdout
    return process, int(process.stdout.readline().split()[-2])


def test_signals_reach_the_worker(name: str, tmp_path: Path) -> None:
    process, _ = waiting(name, tmp_path)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=20)[0]
    assert output == f"[{int(signal.SIGUSR1)}, {int(signal.SIGTERM)}]\n"
    assert process.returncode == 0


def test_a_killed_client_takes_its_worker_along(name: str, tmp_path: Path) -> None:
    process, worker = waiting(name, tmp_path)
    assert alive(worker)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while alive(worker):
        assert time.monotonic() < deadline, "the worker outlived its client"
        time.sleep(0.01)
    again = client(name, tmp_path, "go", "0")  # and the standby goes on
    assert again.wait(timeout=20) == 0


def test_a_killed_worker_is_seen_by_the_agent_as_killed(name: str, tmp_path: Path) -> None:
    process, worker = waiting(name, tmp_path)
    os.kill(worker, signal.SIGKILL)
    assert process.wait(timeout=20) == -signal.SIGKILL


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_user_gets_no_worker(name: str, tmp_path: Path) -> None:
    assert client(name, tmp_path, "go", "0").wait(timeout=60) == 0
    code = "import os, sys; from elastic_gpt.standby import work; os.setuid(65534)\n"
    code += f"sys.exit(work({name!r}, ['train', 'go', '0']))"
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert refused.returncode == 128 + signal.SIGKILL
    assert refused.stdout == ""


def test_without_a_standby_the_worker_starts_the_slow_way(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, standby.__file__, "nobody-listens-here", "train", "--help"],
        capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert "imports torch itself" in process.stderr
    assert "usage: elastic-gpt train" in process.stdout
    assert process.returncode == 0
