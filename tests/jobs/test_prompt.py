"""prompt.py: a pod with the job's model comes for a person and goes with them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_gpt.jobs import prompt
from tests.conftest import PATIENCE
from tests.jobs.cluster import StubCluster, entry, later, running

Job = Callable[..., int]
Output = pytest.CaptureFixture[str]


def test_prompt_makes_a_pod_with_the_jobs_image_volume_and_run(
    stub: StubCluster, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = running(stub)
    container = tree["spec"]["replicaSpecs"]["worker"]["template"]["spec"]["containers"][0]
    container["image"] = "registry.example.com/gpt:1"
    seen: dict[str, Any] = {}

    def terminal(_: Any, pod: str) -> int:
        seen.update(stub.get("Pod", pod) or {})
        return 7

    monkeypatch.setattr(prompt, "attach", terminal)
    later(stub, lambda: stub.get("Pod", "elastic-gpt-prompt").update(status={"phase": "Running"}))  # type: ignore[union-attr]
    assert job("prompt", "elastic-gpt", "--timeout", PATIENCE) == 7
    [made] = seen["spec"]["containers"]
    assert made["image"] == "registry.example.com/gpt:1"
    assert made["args"] == ["elastic-gpt", "generate", "/workspace/elastic-gpt/run"]
    assert (made["stdin"], made["tty"]) == (True, True)
    assert not stub.get("Pod", "elastic-gpt-prompt")  # and it goes with the person


def test_prompt_shows_why_the_pod_ended(stub: StubCluster, job: Job, capsys: Output) -> None:
    running(stub)
    stub.logs["elastic-gpt-prompt"] = [entry(1, "error: no checkpoint in /workspace/elastic-gpt/run yet")]
    later(stub, lambda: stub.get("Pod", "elastic-gpt-prompt").update(status={"phase": "Failed"}))  # type: ignore[union-attr]
    assert job("prompt", "elastic-gpt", "--timeout", PATIENCE) == 2
    output = capsys.readouterr()
    assert "no checkpoint" in output.out
    assert "has ended before anything was asked" in output.err


def test_what_an_earlier_talk_left_goes_before_the_next_one(
    stub: StubCluster, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    running(stub)
    stub.pod("elastic-gpt-prompt", {}, "Succeeded")
    monkeypatch.setattr(prompt, "attach", lambda *_: 0)
    later(stub, lambda: stub.get("Pod", "elastic-gpt-prompt").update(status={"phase": "Running"}))  # type: ignore[union-attr]
    assert job("prompt", "elastic-gpt", "--timeout", PATIENCE) == 0
    changes = [method for method, path in stub.requests if method != "GET" and "/pods" in path]
    assert changes == ["DELETE", "POST", "DELETE"]


def test_kubectl_connects_the_terminal_to_the_same_cluster_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        called.append(command)
        return SimpleNamespace(returncode=5)

    monkeypatch.setattr(prompt, "shutil", SimpleNamespace(which=lambda name: f"/bin/{name}"))
    monkeypatch.setattr(prompt, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    cluster: Any = SimpleNamespace(namespace="theirs", kubectl_flags=("--context", "far"))
    assert prompt.attach(cluster, "a-pod") == 5
    flags = ["--namespace", "theirs", "--context", "far"]
    assert called == [["/bin/kubectl", *flags, "attach", "a-pod", "--container=prompt", "-it"]]
