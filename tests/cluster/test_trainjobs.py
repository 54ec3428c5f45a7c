"""Kubeflow's TrainJobs on a real API server, with a stand-in for Kubeflow's controller: one by one, and as a pipeline."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kubernetes import client

from elastic_gpt.jobs.trainjob_actions import PODS_OF
from tests.cluster.conftest import HERE, IMAGE, SHORT, TRAINING, Cluster, Job, Terminal
from tests.cluster.trainjob_controller import Controller
from tests.conftest import PATIENCE, assert_same_run, environment, events, until
from tests.examples.test_pipelines import LOCAL, python, run  # noqa: F401 (python is a fixture)

Make = Callable[..., Job]
SPEC = f"--image={IMAGE} --gpus=0 --cpus=1 --memory=4 --tokenizer=char --env=OMP_NUM_THREADS=1 --nodes=2".split()
FLAGS = ["--", *TRAINING, f"--steps={SHORT}"]


@pytest.fixture
def controller(cluster: Cluster) -> Iterator[None]:
    cluster.kubectl("apply", "-f", HERE / "trainjob-crd.yaml")

    def served() -> bool:
        with contextlib.suppress(client.ApiException):
            for plural in ("trainjobs", "trainingruntimes"):
                cluster.custom.list_cluster_custom_object("trainer.kubeflow.org", "v1alpha1", plural)
            return True
        return False

    until(served)
    made = Controller(cluster.kubeconfig)
    made.start()
    yield
    made.stop()


def pods(job: Job, step: str, phase: str = "Running") -> list[str]:
    found = job.cluster.core.list_namespaced_pod(
        job.spec.namespace, label_selector=f"{PODS_OF}={job.spec.name}-{step}"
    ).items
    return [pod.metadata.name for pod in found if pod.status.phase == phase]


def say_exit(job: Job) -> None:
    """A person attaches to the last step and leaves."""
    end = time.monotonic() + PATIENCE
    while not pods(job, "generative-prompt") and time.monotonic() < end:
        time.sleep(0.2)
    [pod] = pods(job, "generative-prompt")
    words = ["kubectl", "--kubeconfig", str(job.cluster.kubeconfig), "-n", job.spec.namespace]
    terminal = Terminal([*words, "attach", "-it", pod, "-c", "node"], environment(TERM="xterm"))
    terminal.type("\n")
    terminal.expect("GPT prompt > ")
    terminal.type("exit\n")
    terminal.end()


def test_a_pipeline_makes_three_trainjobs_and_waits_for_each(
    controller: None,  # noqa: ARG001
    make_job: Make,
    undisturbed: Callable[[Job], Path],
    python: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    job = make_job(steps=SHORT)
    job.apply(("namespace", "volume"))
    person = threading.Thread(target=say_exit, args=(job,), daemon=True)
    person.start()
    options = [job.spec.name, f"--namespace={job.spec.namespace}", *SPEC, *FLAGS]
    done = run(
        tmp_path, python, "-c", LOCAL, tmp_path, "gpt_trainjobs", json.dumps({"options": options}),
        KUBECONFIG=str(job.cluster.kubeconfig),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    person.join(PATIENCE)
    assert_same_run(job.run, undisturbed(job))
    assert max(event["world_size"] for event in events(job.run, "joined")) == 2
    said = job.command("status", job.spec.name, "--as=trainjob")
    for step in ("load-corpus", "train-gpt", "generative-prompt"):
        assert f"{job.spec.name}-{step}: Complete" in said
    assert "volume elastic-gpt stays" in job.command("delete", job.spec.name, "--as=trainjob")


def test_a_submitted_job_loses_a_pod_and_one_that_fails_says_so(
    controller: None,  # noqa: ARG001
    make_job: Make,
    undisturbed: Callable[[Job], Path],
) -> None:
    job = make_job(steps=SHORT)
    job.cluster.kubectl("create", "namespace", job.spec.namespace)
    job.command("submit", job.spec.name, "--as=trainjob", *SPEC, *FLAGS)
    until(lambda: job.step() >= 5)
    lost = next(name for name in pods(job, "train-gpt") if "-0-1-" in name)  # not the one with torchrun's store
    job.kill(lost)
    job.command("wait", job.spec.name, "--as=trainjob")
    assert_same_run(job.run, undisturbed(job))
    assert lost in pods(job, "train-gpt", "Failed")
    failing = [f"{job.spec.name}x", "--as=trainjob"]
    job.command("submit", *failing, *SPEC, "--text=/workspace/none.txt", *FLAGS)
    assert "load-corpus: Failed (jobset failed" in job.command("wait", *failing, code=1)
