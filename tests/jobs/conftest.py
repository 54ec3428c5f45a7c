from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_gpt.jobs import commands, polling
from tests.jobs.cluster import StubCluster


@pytest.fixture
def stub() -> Iterator[StubCluster]:
    cluster = StubCluster()
    yield cluster
    cluster.close()


@pytest.fixture
def job(stub: StubCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`elastic-gpt job ...` against the stand-in; returns the exit code."""
    monkeypatch.setenv("KUBECONFIG", str(stub.kubeconfig(tmp_path)))
    monkeypatch.setattr(polling, "POLL_SECONDS", 0.05)
    return lambda *words: commands.main([str(word) for word in words])
