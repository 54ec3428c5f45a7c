"""Kubeflow's TrainJobs say what its CRDs, its SDK and Kubernetes take, and run here as its controller would have them run."""

import contextlib
import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from elastic_gpt.jobs.spec import JobSpec
from elastic_gpt.jobs.trainjob import PARTS
from tests.conftest import PATIENCE, TEST_DATA, TINY, assert_same_run, elastic_gpt, environment, metrics
from tests.examples.schemas import (
    assert_first_line_renders,
    assert_whole,
    crd_validator,
    lacking,
    misspelt,
    unnoticed,
    without,
)
from tests.examples.test_manifests import WITHOUT_DLROVER, as_pod, validate
from tests.examples.test_torchrun import free_port

REPO = Path(__file__).parents[2]
FOLDER = REPO / "examples" / "kubeflow"
CRDS = TEST_DATA / "crds"
Tree = dict[str, Any]

FILES = {path.name: list(yaml.safe_load_all(path.read_text())) for path in sorted(FOLDER.glob("*.yaml"))}
DOCUMENTS = {f"{name}:{tree['kind']}": tree for name, trees in FILES.items() for tree in trees}
for part in PARTS.values():
    DOCUMENTS |= {f"every option:{tree['kind']} {tree['metadata']['name']}": tree for tree in part(WITHOUT_DLROVER)}
KUBEFLOWS = {where: tree for where, tree in DOCUMENTS.items() if "kubeflow" in tree["apiVersion"]}
PODS = {
    where: as_pod(
        tree["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"] | {"metadata": {}}
    )
    for where, tree in KUBEFLOWS.items()
    if tree["kind"] == "TrainingRuntime"
}
every_kubeflow = pytest.mark.parametrize("tree", KUBEFLOWS.values(), ids=KUBEFLOWS)
every_pod = pytest.mark.parametrize("pod", PODS.values(), ids=PODS)


def errors(tree: Tree) -> list[str]:
    path = CRDS / f"trainer.kubeflow.org_{tree['kind'].lower()}s.yaml"
    return [error.message for error in crd_validator(path).iter_errors(tree)]


@pytest.mark.parametrize("name", FILES)
def test_an_example_is_what_the_command_in_its_first_line_renders(name: str) -> None:
    assert_first_line_renders(FOLDER / name)


@every_kubeflow
def test_the_crd_takes_every_field(tree: Tree) -> None:
    assert errors(tree) == []


@every_kubeflow
def test_a_misspelt_field_is_caught(tree: Tree) -> None:
    free = ("requests", "limits", "metadata", "labels", "nodeSelector")
    cases = [case for case in misspelt(tree, free) if case[0].startswith("spec.")]
    assert len(cases) >= 4
    assert [where for where, broken in cases if not errors(broken)] == []


POD = "spec.template.spec.replicatedJobs.template.spec.template.spec"
NEEDED = {
    "TrainJob": (
        "apiVersion",
        "metadata.name",
        "metadata.namespace",
        "spec.runtimeRef.name",
        "spec.runtimeRef.kind",
        "spec.trainer.args",
    ),
    "TrainingRuntime": (
        *(
            "apiVersion",
            "metadata.name",
            "metadata.namespace",
            "spec.mlPolicy.numNodes",
            "spec.template.spec.replicatedJobs.name",
        ),
        *(f"{POD}.containers.{field}" for field in ("name", "image", "command", "resources", "volumeMounts")),
        *(f"{POD}.{field}" for field in ("restartPolicy", "securityContext", "volumes")),
    ),
}


@every_kubeflow
def test_it_has_what_the_controller_reads_and_a_missing_field_is_caught(tree: Tree) -> None:
    needed = NEEDED[tree["kind"]]
    if "train-gpt" in tree["metadata"]["name"]:
        needed += ("spec.trainer.numNodes", "spec.trainer.numProcPerNode") * (tree["kind"] == "TrainJob")
        needed += (f"{POD}.containers.env", f"{POD}.initContainers") * (tree["kind"] == "TrainingRuntime")
    assert lacking(tree, needed) == []
    for path in needed:
        assert lacking(without(tree, path), (path,)) == [path]


@every_kubeflow
def test_kubeflows_sdk_reads_it_and_gives_it_back(tree: Tree) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api")
    model = getattr(models, f"TrainerV1alpha1{tree['kind']}")
    assert model.from_dict(copy.deepcopy(tree)).to_dict() == tree


@every_pod
def test_kubernetes_takes_every_field_of_the_pods_and_no_misspelt_one(pod: Tree) -> None:
    validate(pod | {"metadata": {"name": "a"}})
    missed = []
    for where, broken in misspelt(pod, free=("requests", "limits", "metadata", "nodeSelector")):
        if where.startswith("spec."):
            with contextlib.suppress(kubernetes_validate.ValidationError):
                validate(broken)
                missed.append(where)
    assert not missed


@every_pod
def test_a_pod_is_what_kubeflows_controller_and_a_restricted_namespace_look_for(pod: Tree) -> None:
    [container] = pod["spec"]["containers"]
    assert container["name"] == "node"  # the one that gets torchrun's environment
    assert container["command"][:2] == ["tini", "--"]  # `command` replaces the image's entrypoint
    assert_whole(pod["spec"])


@every_pod
def test_a_field_that_is_missing_from_a_pod_is_caught(pod: Tree) -> None:
    assert unnoticed(pod["spec"], lambda broken: validate(as_pod({"spec": broken}))) == []


@pytest.mark.parametrize("where", [where for where, tree in KUBEFLOWS.items() if tree["kind"] == "TrainJob"])
def test_a_trainjob_names_a_runtime_that_is_rendered_with_it(where: str) -> None:
    runtimes = {t["metadata"]["name"]: t for t in KUBEFLOWS.values() if t["kind"] == "TrainingRuntime"}
    job = KUBEFLOWS[where]
    runtime = runtimes[job["spec"]["runtimeRef"]["name"]]
    labels = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["metadata"]["labels"]
    assert labels == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert job["spec"]["trainer"].get("numNodes", 1) == runtime["spec"]["mlPolicy"]["numNodes"]
    # Without `torch` the controller sets no PET_...; only training reads them.
    assert ("torch" in runtime["spec"]["mlPolicy"]) == ("numProcPerNode" in job["spec"]["trainer"])
    template = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert isinstance(template["backoffLimit"], int)


def test_the_prompt_has_a_terminal_and_ends_with_its_person() -> None:
    [container] = PODS["generative-prompt.yaml:TrainingRuntime"]["spec"]["containers"]
    assert (container["stdin"], container["stdinOnce"], container["tty"]) == (True, True, True)


def test_the_claim_is_the_one_that_the_steps_mount() -> None:
    [claim] = FILES["pvc.yaml"]
    assert (claim["metadata"]["name"], claim["spec"]["accessModes"]) == ("gpt-pvc", ["ReadWriteOnce"])
    assert (claim["spec"]["resources"]["requests"]["storage"], claim["spec"]["storageClassName"]) == (
        "128Mi",
        "local-path",
    )
    mounts = {
        (volume["persistentVolumeClaim"]["claimName"], mount["mountPath"])
        for where, pod in PODS.items()
        if not where.startswith("every option")
        for volume in pod["spec"]["volumes"]
        for mount in pod["spec"]["containers"][0]["volumeMounts"]
        if volume["name"] == mount["name"] == "workspace"
    }
    assert mounts == {("gpt-pvc", "/gpt")}


class Controller:
    """Runs a TrainJob as Kubeflow's controller and kubelet do: N containers, torchrun's environment, $(NAME) filled in."""

    def __init__(self, volume: Path) -> None:
        self.volume = volume

    def run(self, pair: list[Tree], *, nodes: int = 1, typed: str | None = None) -> str:
        """Runs it. Returns the output of rank 0. Raises AssertionError if a pod fails."""
        runtime, job = pair
        container = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
            "containers"
        ][0]
        more = {one["name"]: one["value"] for one in container["env"] if one["name"] != "HOME"}
        more["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        if "torch" in runtime["spec"]["mlPolicy"]:
            more |= {"PET_NNODES": str(nodes), "PET_NPROC_PER_NODE": str(job["spec"]["trainer"]["numProcPerNode"])}
            more |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
        words = [*container["command"][2:], *job["spec"]["trainer"]["args"]]
        words = [re.sub(r"\$\((\w+)\)", lambda found: more[found[1]], word) for word in words]
        words = [word.replace("/gpt/", f"{self.volume}/") for word in words]
        pods = [
            subprocess.Popen(
                words,
                env=environment(**more, **({"PET_NODE_RANK": str(rank)} if nodes > 1 else {})),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(nodes)
        ]
        try:
            said = [pod.communicate(typed, timeout=PATIENCE)[0] for pod in pods]
        finally:
            for pod in pods:
                pod.kill()
        assert [pod.returncode for pod in pods] == [0] * nodes, said
        return said[0]


@pytest.mark.slow
def test_text_is_loaded_trained_on_by_two_pods_then_by_one_and_talked_to(tmp_path: Path) -> None:
    flags = [*TINY, "--evaluate.interval=0", "--checkpoint.interval=20"]

    def spec(steps: int) -> JobSpec:
        arguments = tuple(word for word in [*flags, f"--steps={steps}"])
        return JobSpec(gpus=0, preset="kubeflow_toy", tokenizer="char", arguments=arguments)

    controller = Controller(tmp_path)
    controller.run(PARTS["load-corpus"](spec(60)))
    run = tmp_path / "elastic-gpt" / "run"
    controller.run(PARTS["train-gpt"](spec(60)), nodes=2)
    undisturbed = tmp_path / "undisturbed"
    data = tmp_path / "elastic-gpt" / "data"
    words = ["--steps=60", "--data.dir", data, "--run-dir", undisturbed]
    elastic_gpt("train", "kubeflow_toy", *flags, *words, OMP_NUM_THREADS="2")  # as the pods have it
    assert_same_run(run, undisturbed)
    controller.run(PARTS["train-gpt"](spec(80)), nodes=1)  # another TrainJob, with another numNodes
    assert len(metrics(run)) == 80
    assert "GPT prompt" in controller.run(PARTS["generative-prompt"](spec(80)), typed="The \nexit\n")
