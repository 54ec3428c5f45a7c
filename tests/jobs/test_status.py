"""What the API server tells, in words."""

import contextlib
import io
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_gpt.jobs.manifest import elasticjob
from elastic_gpt.jobs.spec import JobSpec
from elastic_gpt.jobs.status import age, job_events, job_range, job_state, parse_progress, pod_trouble, progress, world
from elastic_gpt.observers import ConsoleObserver
from elastic_gpt.reports import StepReport

Tree = dict[str, Any]


def pod(name: str, rank: int, phase: str = "Running", **status: Any) -> Tree:
    labels = {"elasticjob.dlrover/replica-type": "worker", "elasticjob.dlrover/rank-index": str(rank)}
    labels |= {"elasticjob.dlrover/relaunch-count": name.rpartition("-")[2]}
    return {"metadata": {"name": name, "labels": labels}, "spec": {}, "status": {"phase": phase, **status}}


def waiting(reason: str, message: str = "", container: str = "main") -> Tree:
    return {"name": container, "state": {"waiting": {"reason": reason, "message": message}}}


def ended(code: int, reason: str = "Error") -> Tree:
    return {"name": "main", "state": {"terminated": {"exitCode": code, "reason": reason}}}


def job(**spec: Any) -> Tree:
    [tree] = elasticjob(JobSpec(nodes=3))
    tree["spec"] |= spec
    return tree


@given(
    step=st.integers(1, 10**7), loss=st.floats(0, 100, allow_nan=False), speed=st.floats(1, 1e9), workers=st.integers(1, 4096),
    mfu=st.none() | st.floats(0, 1), validation=st.none() | st.floats(0, 100),
)  # fmt: skip
def test_what_the_console_observer_writes_is_understood(
    step: int, loss: float, speed: float, workers: int, mfu: float | None, validation: float | None
) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        observer = ConsoleObserver(steps=10**7, start=0, interval=1)
        if validation is not None:
            observer.on_evaluation(step, validation)
        observer.on_step(StepReport(step, loss, 1e-3, 0.5, 1, speed, mfu, workers, ""))
    line = out.getvalue().splitlines()[-1]
    found = parse_progress(f"2026-11-21T10:00:00Z {line}")
    assert found
    assert (found.step, found.steps, found.workers) == (step, 10**7, workers)
    assert found.loss == pytest.approx(loss, abs=1e-4)
    assert found.tokens_per_second == pytest.approx(speed, abs=1)


@pytest.mark.parametrize("text", ["", "step", "step 1: validation loss 2.0", "saved step 3/4", "T step x/y · loss z"])
def test_other_lines_are_no_progress(text: str) -> None:
    assert parse_progress(text) is None


def test_a_loss_that_is_no_number_is_shown() -> None:
    found = parse_progress("T step 1/2 · loss nan · 5 tokens/s · lr 1e-3 · norm nan · 2 workers · 0:01 left")
    assert found
    assert str(found) == "step 1/2 · loss nan · 5 tokens/s · 2 workers · 0:01 left"


def test_the_newest_line_wins_though_an_older_world_was_further() -> None:
    line = "step {}/100 · loss 1.0 · 5 tokens/s · lr 1e-3 · norm 1.0 · {} workers · 0:01 left"
    logs = {
        "a": [f"2026-11-21T10:00:05Z {line.format(90, 3)}"],
        "b": [f"2026-11-21T10:00:09Z {line.format(80, 2)}"],
        "c": [],
    }
    found = progress(logs)
    assert found
    assert found.step == 80
    assert world(logs) == ("2026-11-21T10:00:09Z", 2)
    assert progress({}) is None


def test_a_worlds_size_is_known_before_its_first_step() -> None:
    batch = "batch: 8 sequences x 32 = 256 tokens a step, in 4 micro-batches of 2, 1 or 2 on each of 3 workers"
    assert world({"a": [f"2026-11-21T10:00:05Z {batch}"]}) == ("2026-11-21T10:00:05Z", 3)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"phase": "Running"}, ""),
        ({"phase": "Succeeded"}, ""),
        ({"phase": "Pending"}, ""),
        (
            {"phase": "Pending", "conditions": [
                {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes\nare available"}]},
            "Unschedulable: 0/3 nodes are available",
        ),
        ({"phase": "Pending", "containerStatuses": [waiting("ImagePullBackOff", "Back-off pulling image")]},
         "ImagePullBackOff: Back-off pulling image"),
        ({"phase": "Pending", "containerStatuses": [waiting("ContainerCreating")]}, ""),
        ({"phase": "Pending", "containerStatuses": [waiting("CreateContainerConfigError", "no such user")]},
         "CreateContainerConfigError: no such user"),
        ({"phase": "Pending", "initContainerStatuses": [{"name": "wait-for-data", "state": {"running": {}}}],
          "containerStatuses": [waiting("PodInitializing")]}, "waits for the data that `prepare` makes"),
        ({"phase": "Failed", "containerStatuses": [ended(137)]}, "exit code 137"),
        ({"phase": "Failed", "containerStatuses": [ended(137, "OOMKilled")]}, "exit code 137 (OOMKilled: more --memory)"),
        ({"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."},
         "Evicted The node was low on resource: memory."),
        ({}, ""),
    ],
)  # fmt: skip
def test_why_a_pod_does_not_run(status: Tree, said: str) -> None:
    assert pod_trouble({"status": status}) == said


def test_a_replacement_takes_its_predecessors_place() -> None:
    pods = [
        pod("w-0", 0),
        pod("w-1", 1, "Failed", containerStatuses=[ended(137)]),
        pod("w-3", 1, "Pending"),
        pod("w-2", 2),
    ]
    state = job_state(job(), pods)
    assert [node.name for node in state.nodes] == ["w-0", "w-3", "w-2"]
    assert (state.running, state.wanted, state.least, state.most) == (2, 3, 1, 4)
    assert state.troubles() == []


def test_a_node_that_leaves_is_no_running_one() -> None:
    leaving = pod("w-1", 1)
    leaving["metadata"]["deletionTimestamp"] = "2026-11-21T10:00:00Z"
    state = job_state(job(), [pod("w-0", 0), leaving])
    assert [node.phase for node in state.nodes] == ["Running", "Leaving"]
    assert state.running == 1


def test_a_suspended_job_says_so_whatever_the_operator_says() -> None:
    tree = job(suspend=True)
    tree["status"] = {"phase": "Running"}
    assert job_state(tree, [pod("w-0", 0)]).phase == "Suspending"
    assert job_state(tree, [pod("w-0", 0, "Succeeded")]).phase == "Suspended"
    assert job_state(tree, []).wanted == 0


def test_a_job_that_no_operator_has_seen_is_new_and_a_failed_one_says_why() -> None:
    assert job_state(job(), []).phase == "New"
    tree = job()
    conditions = [{"type": "Running", "message": ""}, {"type": "Failed", "message": "The job master failed."}]
    tree["status"] = {"phase": "Failed", "status": {"conditions": conditions}}
    assert job_state(tree, []).headline() == "Failed (The job master failed)"


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (["elastic-gpt", "launch", "--nnodes=2:6"], (2, 6)),
        (["dlrover-run", "--nnodes", "2:6", "x"], (2, 6)),
        (["dlrover-run", "--nnodes=3"], (3, 3)),
        (["python", "train.py"], None),
        (["dlrover-run", "--nnodes"], ValueError),
    ],
)
def test_the_range_is_what_the_agents_are_told(args: list[str], found: Any) -> None:
    tree = job()
    tree["spec"]["replicaSpecs"]["worker"]["template"]["spec"]["containers"][0] = {"args": args}
    if found is ValueError:
        with pytest.raises(ValueError, match="write for example --nnodes 2:4"):
            job_range(tree)
    else:
        assert job_range(tree) == found


def test_a_jobs_events_are_those_of_its_pods_and_no_other_jobs() -> None:
    about = [
        "gpt",
        "gpt-edljob-worker-0",
        "elasticjob-gpt-dlrover-master-0",
        "gpt-prepare-x7",
        "data",
        "gpt-2",
        "gpt-2-edljob-worker-0",
    ]
    events = [
        {
            "involvedObject": {"name": name},
            "metadata": {},
            "lastTimestamp": f"2026-11-21T10:00:0{9 - place}Z",
            "type": "Warning",
        }
        for place, name in enumerate(about)
    ]
    assert [event.about for event in job_events("gpt", "data", events)] == about[4::-1]


def test_ages_are_short() -> None:
    now = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
    ages = [age(since, now) for since in ("2026-11-21T11:59:30Z", "2026-11-21T11:00:00Z", "2026-11-11T12:00:00Z", "")]
    assert ages == ["30s", "1h", "10d", ""]
