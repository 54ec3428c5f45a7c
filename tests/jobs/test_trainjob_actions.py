"""TrainJobs are made, looked at, waited for and deleted, with a stand-in that does to them what Kubeflow's controller does."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from elastic_gpt.jobs.trainjob_actions import PODS_OF, step_state
from tests.conftest import until
from tests.jobs.cluster import StubCluster

Tree = dict[str, Any]
Job = Callable[..., int]
SUBMIT = ("--as=trainjob", "--gpus=0", "--tokenizer=char", "--text=https://example.com/text.txt")


def condition(kind: str, status: str = "True", message: str = "") -> Tree:
    return {"type": kind, "status": status, "reason": kind, "message": message}


class Controller:
    """Kubeflow's controller and JobSet's: pods for each TrainJob, of its runtime's pod; and its conditions, as pods end."""

    def __init__(self, stub: StubCluster) -> None:
        self.stub = stub

    def pods(self, name: str) -> list[Tree]:
        """Made if there are none yet; a TrainJob without its runtime gets none."""
        job = self.stub.get("TrainJob", name)
        assert job
        runtime = self.stub.get("TrainingRuntime", job["spec"]["runtimeRef"]["name"])
        assert runtime, "the controller finds no runtime"
        nodes = job["spec"]["trainer"].get("numNodes", runtime["spec"]["mlPolicy"]["numNodes"])
        made = []
        for index in range(nodes):
            pod = f"{name}-node-0-{index}-abcde"
            made.append(self.stub.get("Pod", pod) or self.stub.pod(pod, {PODS_OF: name}))
        return made

    def end(self, name: str, how: str, message: str = "") -> None:
        for pod in self.pods(name):
            pod["status"] = {"phase": "Succeeded" if how == "Complete" else "Failed"}
        job = self.stub.get("TrainJob", name)
        assert job
        job["status"] = {"conditions": [condition("Suspended", "False"), condition(how, message=message)]}

    def collect(self, name: str) -> None:
        """Its owner is gone."""
        for key in [
            key for key, tree in self.stub.objects.items() if tree["metadata"].get("labels", {}).get(PODS_OF) == name
        ]:
            del self.stub.objects[key]


@pytest.fixture
def controller(stub: StubCluster) -> Controller:
    stub.add({"kind": "Namespace", "metadata": {"name": "training"}})
    return Controller(stub)


def test_a_job_goes_from_text_to_a_model_and_is_waited_for(
    stub: StubCluster, controller: Controller, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job("submit", "toy", *SUBMIT, "--nodes=2", "--", "--steps=10") == 0
    kinds = {(kind, name) for kind, _, name in stub.objects}
    assert {
        ("TrainingRuntime", "toy-load-corpus-runtime"), ("TrainJob", "toy-load-corpus"),
        ("TrainingRuntime", "toy-train-gpt-runtime"), ("TrainJob", "toy-train-gpt"),
    } <= kinds  # fmt: skip
    assert not any("prompt" in name for _, name in kinds)
    assert "elastic-gpt job wait toy --as trainjob" in capsys.readouterr().out
    controller.pods("toy-train-gpt")
    codes: list[int] = []
    waiting = threading.Thread(target=lambda: codes.append(job("wait", "toy", "--as=trainjob")))
    waiting.start()
    controller.end("toy-load-corpus", "Complete")
    looked = len(stub.requests)
    until(lambda: len(stub.requests) > looked + 12)  # another look at all
    assert waiting.is_alive()
    controller.end("toy-train-gpt", "Complete")
    waiting.join()
    assert codes == [0]
    said = capsys.readouterr().out
    assert "toy-train-gpt: Running, 2 pods running" in said
    assert "toy-train-gpt: Complete" in said


def test_a_step_that_fails_ends_the_wait_with_its_reason(
    controller: Controller, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job("submit", "toy", *SUBMIT)
    controller.end("toy-load-corpus", "Failed", "jobset failed due to one or more job failures")
    assert job("wait", "toy", "--as=trainjob") == 1
    assert "toy-load-corpus: Failed (jobset failed due to one or more job failures)" in capsys.readouterr().out


def test_a_wait_in_vain_ends_with_124(controller: Controller, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert controller
    job("submit", "toy", *SUBMIT)
    assert job("wait", "toy", "--as=trainjob", "--timeout=0") == 124
    assert "`elastic-gpt job status toy --as trainjob` tells more" in capsys.readouterr().err


def test_the_steps_are_made_one_by_one_as_a_pipeline_does(stub: StubCluster, controller: Controller, job: Job) -> None:
    assert job("submit", "toy", *SUBMIT, "--only=volume,text,load-corpus") == 0
    assert stub.get("TrainJob", "toy-train-gpt") is None
    controller.end("toy-load-corpus", "Complete")
    assert job("wait", "toy", "--as=trainjob") == 0
    assert job("submit", "toy", *SUBMIT, "--only=train-gpt") == 0
    controller.end("toy-train-gpt", "Complete")
    assert job("submit", "toy", *SUBMIT, "--only=generative-prompt") == 0
    controller.pods("toy-generative-prompt")
    assert job("wait", "toy", "--as=trainjob") == 0  # nobody waits for a person


def test_submit_twice_changes_nothing_and_what_has_ended_has_to_go_first(
    controller: Controller, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job("submit", "toy", *SUBMIT)
    capsys.readouterr()
    assert job("submit", "toy", *SUBMIT) == 0
    assert "created" not in capsys.readouterr().out
    assert job("submit", "toy", *SUBMIT, "--memory=9") == 2
    assert "`elastic-gpt job delete toy --as trainjob` first" in capsys.readouterr().err
    controller.end("toy-load-corpus", "Complete")
    assert job("submit", "toy", *SUBMIT) == 0
    controller.end("toy-train-gpt", "Failed")
    assert job("submit", "toy", *SUBMIT) == 2
    assert "has ended (Failed)" in capsys.readouterr().err


def test_status_tells_each_step_and_what_keeps_its_pods(
    stub: StubCluster, controller: Controller, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job("submit", "toy", *SUBMIT)
    controller.end("toy-load-corpus", "Complete")
    [first, *_] = controller.pods("toy-train-gpt")
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    first["status"] = {"phase": "Pending", "containerStatuses": [{"name": "node", "state": waiting}]}
    capsys.readouterr()
    assert job("status", "toy", "--as=trainjob") == 0
    said = capsys.readouterr().out
    assert "toy-load-corpus: Complete\n" in said
    assert f"  {first['metadata']['name']}: Pending: ImagePullBackOff: no such image" in said
    assert stub.get("TrainJob", "toy-train-gpt")
    assert job("status", "tay", "--as=trainjob") == 2
    assert "no TrainJobs of job 'tay' in namespace training: did you mean 'toy'?" in capsys.readouterr().err


def test_delete_waits_for_the_pods_and_leaves_the_volume_unless_it_is_asked_for(
    stub: StubCluster, controller: Controller, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job("submit", "toy", *SUBMIT)
    controller.pods("toy-train-gpt")
    assert job("delete", "toy", "--as=trainjob", "--timeout=0") == 124
    assert stub.get("TrainJob", "toy-train-gpt") is None
    assert stub.get("TrainingRuntime", "toy-train-gpt-runtime") is None
    controller.collect("toy-train-gpt")
    claims = [name for kind, _, name in stub.objects if kind == "PersistentVolumeClaim"]
    assert len(claims) == 1
    assert f"volume {claims[0]} stays" in capsys.readouterr().out
    assert job("delete", "toy", "--as=trainjob") == 2
    job("submit", "toy", *SUBMIT)
    assert job("delete", "toy", "--as=trainjob", "--volume") == 0
    assert not [name for kind, _, name in stub.objects if kind == "PersistentVolumeClaim"]


def test_a_cluster_without_kubeflow_is_told_how_to_get_it(
    stub: StubCluster, controller: Controller, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    assert controller
    stub.unknown |= {"TrainJob", "TrainingRuntime"}
    assert job("submit", "toy", *SUBMIT) == 2
    assert "knows no TrainJobs: install Kubeflow Trainer: kubectl apply" in capsys.readouterr().err


def test_the_flag_only_is_for_trainjobs_alone(
    job: Job, controller: Controller, capsys: pytest.CaptureFixture[str]
) -> None:
    assert controller
    assert job("submit", "toy", "--only=volume") == 2
    assert "--only volume is for --as trainjob" in capsys.readouterr().err
    assert job("submit", "toy", *SUBMIT, "--only=train-gtp") == 2
    assert "did you mean train-gpt?" in capsys.readouterr().err


def states() -> Iterator[tuple[list[Tree], list[str], str]]:
    yield [], [], "Pending"
    yield [], ["Running"], "Running"
    yield [condition("Suspended")], [], "Suspended"
    yield [condition("Suspended", "False")], ["Pending"], "Pending"
    yield [condition("Complete")], ["Succeeded"], "Complete"
    yield [condition("Suspended"), condition("Failed")], ["Running"], "Failed"


@pytest.mark.parametrize(("conditions", "pods", "phase"), list(states()))
def test_the_phase_is_what_the_conditions_say_or_else_the_pods(
    conditions: list[Tree], pods: list[str], phase: str
) -> None:
    tree = {"metadata": {"name": "one"}, "status": {"conditions": conditions}}
    made = [{"metadata": {"name": "p"}, "spec": {}, "status": {"phase": one}} for one in pods]
    assert step_state(tree, made).phase == phase


def test_a_job_whose_data_and_run_are_urls_needs_neither_volume_nor_load_corpus(
    stub: StubCluster, controller: Controller, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--as=trainjob", "--gpus=0", "--env-secret=keys", "--", "--data.dir=s3://b/data", "--run-dir=s3://b/run")
    assert job("submit", "toy", *words) == 0
    assert {kind for kind, _, _ in stub.objects} == {"Namespace", "TrainingRuntime", "TrainJob"}
    runtime, train = stub.get("TrainingRuntime", "toy-train-gpt-runtime"), stub.get("TrainJob", "toy-train-gpt")
    assert runtime
    assert train
    [replicated] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert "initContainers" not in pod
    assert {volume["name"] for volume in pod["volumes"]} == {"snapshots", "scratch"}
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert {"--data.dir=s3://b/data", "--run-dir=s3://b/run"} <= set(train["spec"]["trainer"]["args"])
    controller.end("toy-train-gpt", "Complete")
    assert job("wait", "toy", "--as=trainjob") == 0
    controller.collect("toy-train-gpt")
    capsys.readouterr()
    assert job("delete", "toy", "--as=trainjob", "--volume") == 2
    assert "job toy has no volume: leave --volume out" in capsys.readouterr().err
    assert job("delete", "toy", "--as=trainjob") == 0
    assert "volume" not in capsys.readouterr().out
