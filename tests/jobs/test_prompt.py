"""prompt.py: a pod with the job's model comes for a person and goes with them."""

from collections.abc import Callable
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
