"""standby.py: for its agent, a worker that is forked from the standby behaves like one that the agent started."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from elastic_gpt.nodes import standby
from tests.conftest import PATIENCE, until
from tests.elastic.test_processes import alive

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the standby needs Linux")

ROOM = """
import os, signal, sys, time
import numpy, torch
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
SLOW_TO_BEGIN = """
import os, time
fork = os.fork
def slow():
    worker = fork()
    time.sleep(0 if worker else 0.3)
    return worker
os.fork = slow
"""


@contextlib.contextmanager
def standby_of(folder: Path, before: str = "", nohup: bool = False) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A running standby: its name and process."""
    (folder / "room.py").write_text(textwrap.dedent(ROOM))
    name = f"test-{secrets.token_hex(8)}"
    code = f"import sys; sys.path.insert(0, '{folder}'); from elastic_gpt.nodes.standby import serve\n{before}\n"
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        code += f"serve({listener.fileno()}, ['room'], {os.getpid()}, {nohup})"
        server = subprocess.Popen([sys.executable, "-c", code], env=environment, pass_fds=[listener.fileno()])
    try:
        yield name, server
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with standby_of(tmp_path) as found:
        yield found


@pytest.fixture
def name(running: tuple[str, subprocess.Popen[bytes]]) -> str:
    return running[0]


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
        output, errors = process.communicate(timeout=PATIENCE)
        assert output.startswith(f"elastic-gpt train ['go', '{code}'] red {tmp_path} ")
        assert output.endswith(" 1\n")  # the threads of its environment, not of the standby's
        assert errors == "to standard error\n"
        assert process.returncode == int(code)


def test_an_exception_is_a_traceback_and_exit_code_1(name: str, tmp_path: Path) -> None:
    process = client(name, tmp_path, "raise")
    assert "RuntimeError: of its own" in process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 1


def waiting(name: str, folder: Path) -> tuple[subprocess.Popen[str], int]:
    process = client(name, folder, "wait", "0")
    assert process.stdout
    return process, int(process.stdout.readline().split()[-2])


def test_signals_reach_the_worker(name: str, tmp_path: Path) -> None:
    process, _ = waiting(name, tmp_path)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=PATIENCE)[0]
    assert output == f"[{int(signal.SIGUSR1)}, {int(signal.SIGTERM)}]\n"
    assert process.returncode == 0


def test_a_terminal_that_closes_ends_the_worker_and_not_the_standby(
    running: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    name, server = running
    process, _ = waiting(name, tmp_path)
    for told in (server, process):
        told.send_signal(signal.SIGHUP)
    assert process.wait(timeout=PATIENCE) == -signal.SIGHUP  # the room has no handler for it
    assert client(name, tmp_path, "go", "0").wait(timeout=PATIENCE) == 0
    assert server.poll() is None


def test_under_nohup_nobody_minds_a_terminal_that_closes(tmp_path: Path) -> None:
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with standby_of(tmp_path, nohup=True) as (name, server):
            process, worker = waiting(name, tmp_path)
            for told in (server.pid, process.pid, worker):
                os.kill(told, signal.SIGHUP)
            process.send_signal(signal.SIGUSR1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=PATIENCE) == 0
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_a_killed_client_takes_its_worker_along(name: str, tmp_path: Path) -> None:
    process, worker = waiting(name, tmp_path)
    assert alive(worker)
    process.kill()
    process.wait()
    until(lambda: not alive(worker), "the worker outlived its client")
    again = client(name, tmp_path, "go", "0")  # and the standby goes on
    assert again.wait(timeout=PATIENCE) == 0


def test_a_killed_worker_is_seen_by_the_agent_as_killed(name: str, tmp_path: Path) -> None:
    process, worker = waiting(name, tmp_path)
    os.kill(worker, signal.SIGKILL)
    assert process.wait(timeout=PATIENCE) == -signal.SIGKILL


def test_a_killed_standby_takes_its_workers_along_whatever_they_do(
    running: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    name, server = running
    process, worker = waiting(name, tmp_path)  # which has not joined a world, where it would look after itself
    server.kill()
    assert process.wait(timeout=PATIENCE) == 128 + signal.SIGKILL
    until(lambda: not alive(worker), "the worker outlived the standby")


def test_a_client_that_is_killed_while_it_waits_costs_nobody_else(
    running: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    name, server = running
    other, _ = waiting(name, tmp_path)
    server.send_signal(signal.SIGSTOP)
    lost = client(name, tmp_path, "wait", "0")
    time.sleep(0.5)  # it has asked
    lost.kill()
    lost.wait()
    server.send_signal(signal.SIGCONT)
    assert client(name, tmp_path, "go", "0").wait(timeout=PATIENCE) == 0
    until(lambda: len(psutil.Process(server.pid).children()) == 1, "the worker outlived its client")
    assert other.poll() is None
    other.kill()
    other.wait()


def test_who_connects_and_says_nothing_keeps_nobody_waiting(
    running: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    name, server = running
    assert client(name, tmp_path, "go", "0").wait(timeout=PATIENCE) == 0  # it is up
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(f"\0{name}")
        assert client(name, tmp_path, "go", "0").wait(timeout=PATIENCE) == 0
        assert psutil.Process(server.pid).children()
    until(lambda: not psutil.Process(server.pid).children(), "a worker for nobody")
    assert client(name, tmp_path, "go", "0").wait(timeout=PATIENCE) == 0


def test_a_standby_that_dies_as_it_is_asked_looks_like_a_killed_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    monkeypatch.setattr(standby, "_connect", lambda _: ours)
    try:
        assert standby.work("gone", ["train"]) == 128 + signal.SIGKILL
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, standby.SIGNALS)


def test_a_signal_that_comes_before_the_worker_is_ready_is_not_lost(tmp_path: Path) -> None:
    with standby_of(tmp_path, before=SLOW_TO_BEGIN) as (name, server):
        assert client(name, tmp_path, "go", "0").wait(timeout=PATIENCE) == 0
        server.send_signal(signal.SIGSTOP)
        process = client(name, tmp_path, "wait", "0")
        time.sleep(0.5)  # it has asked
        process.send_signal(signal.SIGTERM)
        server.send_signal(signal.SIGCONT)
        assert process.stdout
        if process.stdout.readline():  # the room had set its handler, and waits for the other one
            process.send_signal(signal.SIGUSR1)
            assert process.wait(timeout=PATIENCE) == 0  # it has heard of both
        else:
            assert process.wait(timeout=PATIENCE) == -signal.SIGTERM


def test_the_standby_forks_without_threads(running: tuple[str, subprocess.Popen[bytes]], tmp_path: Path) -> None:
    name, server = running
    assert client(name, tmp_path, "go", "0").wait(timeout=PATIENCE) == 0
    assert len(list(Path(f"/proc/{server.pid}/task").iterdir())) == 1


def test_messages_that_come_at_once_are_told_apart() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        standby.send(ours, {"worker": 1})
        standby.send(ours, {"code": 0})
        assert [standby.receive(theirs)[0] for _ in range(2)] == [{"worker": 1}, {"code": 0}]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_user_gets_no_worker(name: str, tmp_path: Path) -> None:
    assert client(name, tmp_path, "go", "0").wait(timeout=PATIENCE) == 0
    code = "import os, sys; from elastic_gpt.nodes.standby import work; os.setuid(65534)\n"
    code += f"sys.exit(work({name!r}, ['train', 'go', '0']))"
    refused = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert refused.returncode == 128 + signal.SIGKILL
    assert refused.stdout == ""


@contextlib.contextmanager
def agent_of(folder: Path, room: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A process that keeps a standby, and the name of that."""
    (folder / "room.py").write_text(textwrap.dedent(room))
    name = f"test-{secrets.token_hex(8)}"
    code = (
        f"import sys; from elastic_gpt.nodes.standby import keep; keep({name!r}, ['room']); print('kept', flush=True)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    agent = subprocess.Popen(
        [sys.executable, "-c", f"{code}; sys.stdin.read()"], env=environment | {"PYTHONPATH": path},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert agent.stdout
    assert agent.stdout.readline() == "kept\n"
    try:
        yield name, agent
    finally:
        agent.kill()
        agent.wait()


def test_a_killed_standby_has_a_successor_and_who_comes_meanwhile_waits_for_it(tmp_path: Path) -> None:
    with agent_of(tmp_path, ROOM) as (name, agent):
        running, worker = waiting(name, tmp_path)
        (server,) = psutil.Process(agent.pid).children()
        server.kill()
        early = client(name, tmp_path, "go", "3")
        assert running.wait(timeout=PATIENCE) == 128 + signal.SIGKILL
        until(lambda: not alive(worker), "the worker outlived the standby")
        errors = early.communicate(timeout=PATIENCE)[1]
        assert (early.returncode, errors) == (3, "to standard error\n")
        (successor,) = psutil.Process(agent.pid).children()
        assert successor.pid != server.pid
        agent.kill()
        until(lambda: not alive(successor.pid), "the successor outlived the agent")


@pytest.mark.parametrize("end", ["raise RuntimeError('of the room')", "import os; os.kill(os.getpid(), 11)"])
def test_a_standby_that_cannot_start_leaves_its_workers_to_say_why(tmp_path: Path, end: str) -> None:
    with agent_of(tmp_path, end) as (name, agent):
        until(lambda: standby._connect(name) is None, "somebody still listens")
    assert agent.stderr
    assert ("of the room" if "raise" in end else "3 standby processes were killed") in agent.stderr.read()


def test_a_signal_for_the_workers_does_not_kill_a_standby_that_is_starting(tmp_path: Path) -> None:
    with agent_of(tmp_path, ROOM) as (name, agent):
        until(lambda: bool(psutil.Process(agent.pid).children()), "no standby was started")
        (starting,) = psutil.Process(agent.pid).children()
        starting.send_signal(signal.SIGUSR1)
        assert client(name, tmp_path, "go", "0").wait(timeout=PATIENCE) == 0
        assert psutil.Process(agent.pid).children() == [starting]


def test_without_a_standby_the_worker_starts_the_slow_way(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, standby.__file__, "nobody-listens-here", "train", "--help"],
        capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert "imports torch itself" in process.stderr
    assert "usage: elastic-gpt train" in process.stdout
    assert process.returncode == 0


def test_a_worker_that_starts_the_slow_way_dies_with_its_agent(tmp_path: Path) -> None:
    (tmp_path / "elastic_gpt").mkdir()
    (tmp_path / "elastic_gpt/__init__.py").touch()
    (tmp_path / "elastic_gpt/cli.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    agent = (
        "import subprocess, sys\nworker = subprocess.Popen(sys.argv[1:])\nprint(worker.pid, flush=True)\nworker.wait()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", agent, sys.executable, "-I", "-S", standby.__file__, "nobody-listens-here", "train"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert process.stdout
    worker = int(process.stdout.readline())
    assert process.stdout.readline() == "up\n"
    process.kill()
    process.wait()
    until(lambda: not alive(worker), "the worker outlived its agent")
