"""polling.py: a job's state is read again and again, whatever happens to its pods and to the server."""

from collections.abc import Callable
from typing import Any

import pytest

from elastic_gpt.jobs import client, polling
from elastic_gpt.jobs.polling import Told, again
from tests.jobs.cluster import StubCluster, entry, progress, running

Job = Callable[..., int]
Output = pytest.CaptureFixture[str]


def test_a_typo_in_a_jobs_name_gets_the_nearest(stub: StubCluster, job: Job, capsys: Output) -> None:
    running(stub)
    assert job("status", "elastic-gtp") == 2
    assert "no job 'elastic-gtp' in namespace training: did you mean 'elastic-gpt'?" in capsys.readouterr().err
    assert job("delete", "elastic-gtp") == 2


def test_progress_survives_tracebacks_and_pods_that_are_gone(stub: StubCluster, job: Job, capsys: Output) -> None:
    tree = running(stub)

    def shown() -> str:
        assert job("status", "elastic-gpt") == 0
        return capsys.readouterr().out

    # Its worker's log goes on, with tracebacks.
    stub.logs["elastic-gpt-edljob-worker-0"] += [entry(3, "Traceback (most recent call last):")] * 5000
    assert "step 10/100" in shown()
    # Its pod has ended and was replaced, by one that has not written a line.
    stub.worker("elastic-gpt", 0, "Failed")
    stub.pod("elastic-gpt-edljob-worker-7", stub.worker("elastic-gpt", 0, "Failed")["metadata"]["labels"])
    assert "step 10/100" in shown()
    # All pods are gone, as of a suspended job: the master has written it down.
    stub.logs["elasticjob-elastic-gpt-dlrover-master-0"] = [
        entry(2, "[INFO] a node of DLRover's"), progress(4, 2, step=20, loss=2.0), *[entry(5, "[INFO] more")] * 300
    ]  # fmt: skip
    for key in [key for key in stub.objects if key[0] == "Pod" and "worker" in key[2]]:
        del stub.objects[key]
    tree["spec"]["suspend"] = True
    assert "step 20/100" in shown()
    # And so has the one before it, which was lost.
    stub.master("elastic-gpt", 0, "Failed")
    stub.master("elastic-gpt", 1)
    assert "step 20/100" in shown()


def test_wait_outlives_a_server_that_is_away(
    stub: StubCluster, job: Job, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    tree = running(stub)
    read, calls = polling.read, []

    def flaky(*args: Any) -> Any:
        calls.append(1)
        if 1 < len(calls) < 4:  # the first call finds it: a server that never answered is not waited for
            raise client.UnreachableError("the server does not answer.")
        tree["status"] = {"phase": "Succeeded" if len(calls) > 1 else "Running"}
        return read(*args)

    monkeypatch.setattr(polling, "read", flaky)
    assert job("wait", "elastic-gpt") == 0
    assert capsys.readouterr().out.count("Trying on") == 1


def test_a_server_that_never_answered_is_not_waited_for() -> None:
    def look() -> None:
        raise client.UnreachableError("the server does not answer.")

    with pytest.raises(client.UnreachableError):
        list(again(look, 0.0))


def test_a_line_is_told_once_and_again_when_it_comes_back(capsys: Output) -> None:
    tell = Told()
    for lines in (["a waits"], ["a waits", "b waits"], ["b waits"], ["a waits"]):
        tell(lines)
    assert capsys.readouterr().out.splitlines() == ["a waits", "b waits", "a waits"]
