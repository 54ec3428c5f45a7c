"""logs.py: the logs of all pods are one stream for people, in the order of time."""

import time
from collections.abc import Callable

import pytest

from tests.jobs.cluster import StubCluster, entry, later, running

Job = Callable[..., int]
Output = pytest.CaptureFixture[str]


def test_logs_show_people_nothing_that_is_told_to_machines(stub: StubCluster, job: Job, capsys: Output) -> None:
    running(stub)
    stub.logs["elastic-gpt-edljob-worker-0"].append(entry(3, "step 10/100 · loss 2.5000"))
    assert job("logs", "elastic-gpt") == 0
    assert capsys.readouterr().out == "worker-0 | step 10/100 · loss 2.5000\n"


def test_logs_are_those_of_replaced_pods_too(stub: StubCluster, job: Job, capsys: Output) -> None:
    running(stub)
    stub.logs["elastic-gpt-edljob-worker-0"] = [entry(1, "error: it broke")]
    stub.pod("elastic-gpt-edljob-worker-7", stub.worker("elastic-gpt", 0, "Failed")["metadata"]["labels"])
    assert job("logs", "elastic-gpt") == 0
    assert "worker-0 | error: it broke" in capsys.readouterr().out


def test_logs_of_all_workers_in_the_order_of_time(stub: StubCluster, job: Job, capsys: Output) -> None:
    running(stub)
    stub.logs["elastic-gpt-edljob-worker-0"] = [entry(1, "one"), entry(3, "three")]
    stub.logs["elastic-gpt-edljob-worker-1"] = [entry(2, "two")]
    assert job("logs", "elastic-gpt") == 0
    assert capsys.readouterr().out.splitlines() == ["worker-0 | one", "worker-1 | two", "worker-0 | three"]


def test_followed_logs_take_in_a_pod_that_comes_later(
    stub: StubCluster, job: Job, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic_gpt.jobs.logs.AGAIN_SECONDS", 0.1)
    tree = running(stub, nodes=1)
    stub.logs["elastic-gpt-edljob-worker-0"] = [entry(1, "one")]

    def come() -> None:
        stub.logs["elastic-gpt-edljob-worker-0"].append(entry(2, "two"))
        stub.logs["elastic-gpt-edljob-worker-1"] = [entry(3, "three")]
        stub.worker("elastic-gpt", 1)
        time.sleep(0.5)
        for rank in range(2):
            stub.worker("elastic-gpt", rank, "Succeeded")
        tree["status"] = {"phase": "Succeeded"}

    later(stub, come)
    assert job("logs", "elastic-gpt", "-f") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines[:-1]) == ["worker-0 | one", "worker-0 | two", "worker-1 | three"]
