"""local.py: nodes on this machine, and what is seen of them."""

import io
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from elastic_gpt.nodes import local
from elastic_gpt.nodes.local import LocalJob
from tests.conftest import until
from tests.elastic.test_processes import alive


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def job(said: list[str]) -> Iterator[LocalJob]:
    """A job whose master is not started."""
    made = LocalJob(["train"], least=1, most=3, say=said.append)
    yield made
    made._reserved.close()
    shutil.rmtree(made.logs)


def test_nobody_gets_the_masters_port_while_there_is_no_master() -> None:
    with LocalJob(["train"], least=1, most=1) as job, socket.socket() as other:
        job.kill_master()
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", job.port))
        job.start_master()


@pytest.mark.parametrize(
    ("codes", "node", "code"),
    [
        ((1, -9, 2), 2, 2),  # a user's mistake tells most
        ((-9, 0, 3), 2, 3),  # then a failure of its own; the others were stopped because of it
        ((-15, -9), 0, 1),  # all were killed
    ],
)
def test_a_job_ends_as_the_node_that_failed_and_says_where_its_log_is(
    job: LocalJob, said: list[str], codes: tuple[int, ...], node: int, code: int
) -> None:
    job.nodes = [SimpleNamespace(wait=lambda code=code: code) for code in codes]  # type: ignore[misc]
    assert job.exit_code() == code
    assert said == [f"error: no node finished the job; node {node} ended with {codes[node]}: see {job.log(node)}"]
    (job.logs / "finished").touch()  # a node saw the end; who was killed on the way does not count
    assert job.exit_code() == 0


def test_a_node_without_enough_company_cannot_go_on_unless_the_job_has_finished(job: LocalJob) -> None:
    job.least = 2
    job.nodes = [SimpleNamespace(poll=lambda code=code: code) for code in (None, -9, None)]  # type: ignore[misc]
    assert (job.running(), job.can_go_on()) == ([0, 2], True)
    job.nodes.pop()
    assert (job.running(), job.can_go_on()) == ([0], False)
    (job.logs / "finished").touch()
    assert job.can_go_on()


def test_people_are_shown_output_and_errors_and_the_log_has_all(job: LocalJob, said: list[str]) -> None:
    job._relay(2, io.StringIO("step 1/2\nno torch_musa here\n"), True)
    job._relay(2, io.StringIO("[INFO] an agent's\nwarning: slow\nerror: broke\n  File x\n"), False)
    assert said == ["[node 2] step 1/2", "[node 2] warning: slow", "[node 2] error: broke"]
    assert len(job.log(2).read_text().splitlines()) == 6


def test_a_killed_node_takes_its_processes_and_its_snapshots_with_it_and_no_others(
    job: LocalJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "shared_memory", lambda: tmp_path)
    snapshots = [tmp_path / "run" / job.node_name(node) for node in (0, 1, 10)]
    for folder in snapshots:
        folder.mkdir(parents=True)
    shell = ["sh", "-c", "sleep 600 & echo $!; wait"]
    job.nodes = [subprocess.Popen(shell, stdout=subprocess.PIPE, text=True, start_new_session=True) for _ in range(2)]
    workers = [int(node.stdout.readline()) for node in job.nodes if node.stdout]
    job.kill(1)
    until(lambda: not alive(workers[1]))
    assert [folder.exists() for folder in snapshots] == [True, False, True]
    assert (job.running(), alive(workers[0])) == ([0], True)
    job.kill(0)
