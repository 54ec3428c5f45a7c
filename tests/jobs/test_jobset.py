"""The JobSet holds against JobSet's schema, as it is within Kubeflow's, and against Kubernetes' for the rest."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_gpt.jobs.jobset import PARTS
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
from tests.jobs.test_trainjob import CRDS

FILE = Path(__file__).parents[2] / "examples" / "jobset" / "jobset.yaml"
Tree = dict[str, Any]
JOBSETS = {
    "example": next(tree for tree in yaml.safe_load_all(FILE.read_text()) if tree["kind"] == "JobSet"),
    "every option": PARTS["job"](WITHOUT_DLROVER)[0],
}
every = pytest.mark.parametrize("tree", JOBSETS.values(), ids=JOBSETS)


def errors(tree: Tree) -> list[str]:
    path = CRDS / "trainer.kubeflow.org_trainingruntimes.yaml"
    jobset = crd_validator(path, "spec", "template", "spec")
    return [error.message for error in jobset.iter_errors(tree["spec"])]


def template(tree: Tree) -> Tree:
    [replicated] = tree["spec"]["replicatedJobs"]
    found: Tree = replicated["template"]["spec"]
    return found


def test_the_example_is_what_the_command_in_its_first_line_renders() -> None:
    assert_first_line_renders(FILE)


@every
def test_jobset_takes_every_field_and_no_misspelt_one(tree: Tree) -> None:
    assert errors(tree) == []
    cases = misspelt(tree, free=("requests", "limits", "metadata", "nodeSelector"))
    missed = [where for where, broken in cases if where.startswith("spec.") and not errors(broken)]
    assert missed == []


POD = "spec.replicatedJobs.template.spec.template.spec"
NEEDED = (
    *(
        "apiVersion",
        "kind",
        "metadata.name",
        "metadata.namespace",
        "spec.network.enableDNSHostnames",
        "spec.network.publishNotReadyAddresses",
    ),
    *("spec.replicatedJobs.name", "spec.replicatedJobs.replicas"),
    *(f"spec.replicatedJobs.template.spec.{field}" for field in ("parallelism", "completions", "completionMode")),
    *("spec.replicatedJobs.template.spec.backoffLimit", f"{POD}.initContainers", f"{POD}.restartPolicy"),
    *(f"{POD}.containers.{field}" for field in ("name", "image", "args", "env", "resources", "volumeMounts")),
)


@every
def test_it_has_what_jobset_reads_and_a_missing_field_is_caught(tree: Tree) -> None:
    assert lacking(tree, NEEDED) == []
    for path in NEEDED:
        assert lacking(without(tree, path), NEEDED) == [path]


@every
def test_kubernetes_takes_its_pods_and_a_missing_field_is_caught(tree: Tree) -> None:
    pod = as_pod(template(tree)["template"])
    validate(pod | {"metadata": {"name": "a"}})
    assert_whole(pod["spec"])
    assert unnoticed(pod["spec"], lambda broken: validate(as_pod({"spec": broken}))) == []


@every
def test_every_pod_finds_the_one_with_the_store_by_the_name_that_jobset_gives_it(tree: Tree) -> None:
    name = tree["metadata"]["name"]
    [container] = template(tree)["template"]["spec"]["containers"]
    assert f"--rdzv-endpoint={name}-node-0-0.{name}:29500" in container["args"]
    assert tree["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    job = template(tree)
    assert job["completionMode"] == "Indexed"
    assert f"--nnodes=1:{job['completions']}" in container["args"]
    assert not any("$(" in word or "/gpt" in word for word in container["args"])
    assert "command" not in container  # it would replace the image's entrypoint, tini
