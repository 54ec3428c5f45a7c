"""watch.py: what is printed about a job can be searched, and names the node that the others wait for."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table

from elastic_gpt import worlds
from elastic_gpt.jobs import watch
from elastic_gpt.nodes.rendezvous import PROGRESS_KEY, PROGRESS_SECONDS, Leases
from elastic_gpt.observers import ProgressObserver
from elastic_gpt.pace import WINDOW, Pace
from elastic_gpt.reports import StepReport
from tests.jobs.cluster import StubCluster, entry, running

NODES = ["elastic-gpt-edljob-worker-0", "elastic-gpt-edljob-worker-1"]


def test_a_line_stays_a_line_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("pod", "why", box=None)
    table.add_row("a-pod-with-a-name-as-long-as-they-are-dlrover-master-0", "Back-off pulling image " + "x" * 200)
    watch._console().print(table)
    assert "Back-off pulling image " + "x" * 200 in capsys.readouterr().out


@pytest.mark.parametrize("whose", ["the worker's log", "the master's log"])
def test_a_slow_node_is_named_from_what_its_pods_write(
    stub: StubCluster,
    job: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    whose: str,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("POD_NAME", NODES[0])
    monkeypatch.setenv("ELASTIC_JOB_NAME", "elastic-gpt")
    monkeypatch.delenv("ELASTIC_GPT_LOCAL", raising=False)
    file = worlds.progress_file()
    assert file
    slow, now = set[str](), [0.0]
    leases = Leases(clock=lambda: now[0])
    pace = Pace(NODES, 4, slow)

    def step(seconds: list[float]) -> None:
        for _ in range(2 * WINDOW):
            pace.step(seconds)

    def seen() -> str:
        assert job("status", "elastic-gpt") == 0
        return capsys.readouterr().out

    def written(number: int) -> list[str]:
        """What is in the log of the first worker, or of the master, of a world that has done `number` steps."""
        now[0] += PROGRESS_SECONDS
        capsys.readouterr()
        observer = ProgressObserver(100, number - 1, 1, workers=2, file=file, slow=slow)
        observer.on_step(StepReport(number, 2.5, 1e-3, 0.5, number * 8, 100.0, None, 2, "hash"))
        if whose == "the master's log":
            capsys.readouterr()
            leases.told(PROGRESS_KEY, file.read_bytes())  # as it comes with the agent's lease
        return [entry(number, line) for line in capsys.readouterr().out.splitlines()]

    running(stub)
    pod = NODES[0] if whose == "the worker's log" else "elasticjob-elastic-gpt-dlrover-master-0"
    stub.logs[NODES[0]], stub.logs[pod] = [], written(1)
    assert "slow" not in seen()
    step([0.01, 0.01, 0.03, 0.03])
    stub.logs[pod] = written(2)
    lines = seen().splitlines()
    assert [line.split()[0] for line in lines if watch.SLOW in line] == [NODES[1]]
    assert any(line.startswith("step 2/100") and f"waits for {NODES[1]}" in line for line in lines)
    step([0.01, 0.01, 0.01, 0.01])
    stub.logs[pod] = written(3)
    told = seen()
    assert "step 3/100" in told
    assert watch.SLOW not in told
    assert "waits for" not in told
