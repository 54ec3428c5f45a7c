"""doctor.py: what the doctor finds, and the command that helps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_gpt.jobs.client import KINDS
from elastic_gpt.jobs.doctor import RIGHTS, allocatable_gpus, offers_many
from elastic_gpt.jobs.manifest import manifests
from elastic_gpt.jobs.spec import JobSpec
from tests.jobs.cluster import PATH, RESOURCES, StubCluster

Job = Callable[..., int]
Output = pytest.CaptureFixture[str]


def healthy(
    stub: StubCluster, provisioner: str = "nfs.csi.k8s.io", fields: tuple[str, ...] = ("replicaSpecs", "suspend")
) -> None:
    for tree in manifests(JobSpec(), ("namespace", "rbac")):
        stub.add(tree)
    schema = {"openAPIV3Schema": {"properties": {"spec": {"properties": {field: {} for field in fields}}}}}
    stub.add({"kind": "CustomResourceDefinition", "metadata": {"name": "elasticjobs.elastic.iml.github.io"},
              "spec": {"versions": [{"name": "v1alpha1", "schema": schema}]}})  # fmt: skip
    stub.add({"kind": "Deployment", "metadata": {"name": "dlrover-controller-manager", "namespace": "dlrover"},
              "status": {"availableReplicas": 1}})  # fmt: skip
    default = {"storageclass.kubernetes.io/is-default-class": "true"}
    stub.add(
        {"kind": "StorageClass", "metadata": {"name": "standard", "annotations": default}, "provisioner": provisioner}
    )
    stub.add(
        {
            "kind": "Node",
            "metadata": {"name": "machine"},
            "spec": {},
            "status": {"allocatable": {"nvidia.com/gpu": "8"}},
        }
    )


def found(output: str, what: str) -> str:
    """The finding about something, with the line of its cure."""
    return next(part for part in output.replace("\n         ", " → ").splitlines() if part[9:].startswith(f"{what}: "))


def test_a_cluster_that_has_everything_misses_nothing(stub: StubCluster, job: Job, capsys: Output) -> None:
    healthy(stub)
    assert job("doctor") == 0
    output = capsys.readouterr().out
    assert "MISSING" not in output
    assert found(output, "GPUs") == "ok       GPUs: 8 on 1 machines: machine 8"


def test_an_empty_cluster_is_told_what_to_install(stub: StubCluster, job: Job, capsys: Output) -> None:
    stub.unknown = {"ElasticJob"}
    assert job("doctor") == 1
    output = capsys.readouterr().out
    assert "kubectl apply -k" in found(output, "ElasticJob")
    assert "kubectl apply -k" in found(output, "operator")
    assert "kubectl create namespace training" in found(output, "namespace")
    assert "no storage class" in found(output, "storage")
    assert "--gpus 0" in found(output, "GPUs")


def test_the_old_definition_is_found(stub: StubCluster, job: Job, capsys: Output) -> None:
    healthy(stub, fields=("replicaSpecs",))
    assert job("doctor") == 1
    assert "kubectl apply -f" in found(capsys.readouterr().out, "suspend")


def test_an_operator_whose_image_cannot_be_pulled_is_told(stub: StubCluster, job: Job, capsys: Output) -> None:
    healthy(stub)
    deployment = stub.get("Deployment", "dlrover-controller-manager", "dlrover")
    assert deployment
    deployment["status"] = {}
    waiting = {"reason": "ImagePullBackOff", "message": "Back-off"}
    pod = stub.pod("manager", {"control-plane": "controller-manager"})
    pod["status"] = {"phase": "Pending", "containerStatuses": [{"name": "manager", "state": {"waiting": waiting}}]}
    pod["metadata"]["namespace"] = "dlrover"
    stub.add(pod)
    assert job("doctor") == 1
    assert "not available; ImagePullBackOff: Back-off" in found(capsys.readouterr().out, "operator")


def test_rights_that_lack_are_named_with_what_they_are_for(stub: StubCluster, job: Job, capsys: Output) -> None:
    healthy(stub)
    stub.forbidden = {"Job"}
    assert job("doctor") == 1
    assert "in namespace training you may not get jobs (for submit); create jobs (for submit); " in found(
        capsys.readouterr().out, "your rights"
    )


VERBS = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}


def test_the_rights_are_those_that_the_commands_use(stub: StubCluster, job: Job, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    for said in ("one", "two"):
        text.write_text(said)
        stub.objects = {key: tree for key, tree in stub.objects.items() if key[0] not in ("ElasticJob", "Job")}
        assert job("submit", "mine", "--text", text) == 0
    role = stub.get("Role", "elastic-gpt-master")
    assert role
    role["rules"] = []
    assert job("submit", "mine", "--text", text) == 0  # the same again, but for what somebody has changed
    stub.worker("mine", 0)
    prompt = stub.pod("mine-prompt", {}, "Succeeded")
    assert job("prompt", "mine", "--timeout", 0) == 124
    stub.add(prompt)
    for words in (
        *(["status", "mine"], ["list"], ["logs", "mine"], ["scale", "mine", "--nodes", 1, "--no-wait"]),
        *(["suspend", "mine", "--no-wait"], ["resume", "mine", "--no-wait"]),
        *(["serve", "mine", "--no-wait"], ["serve", "mine", "--no-wait"]),
        ["delete", "mine", "--volume"],
    ):
        assert job(*words) == 0, words
    used = set()
    for method, path in stub.requests:
        if (match := PATH.fullmatch(path)) and KINDS[kind := RESOURCES[match["res"]]][2] and match["ns"]:
            verb = VERBS.get(method, "get" if match["name"] else "list")
            used.add((verb, kind, "log" if match["log"] else ""))
    named = {one[:3] for one in RIGHTS}
    assert used - named == set()
    assert named - used == {("create", "Pod", "attach"), ("get", "Deployment", "")}  # a terminal, and a wait


def test_what_may_not_be_read_is_unknown_not_missing(stub: StubCluster, job: Job, capsys: Output) -> None:
    healthy(stub)
    stub.forbidden = {"Node", "StorageClass", "CustomResourceDefinition"}
    assert job("doctor") == 0
    assert capsys.readouterr().out.count("unknown  ") >= 3


@pytest.mark.parametrize(
    ("provisioner", "mark", "cure"),
    [
        ("nfs.csi.k8s.io", "ok", ""),
        ("ebs.csi.aws.com", "MISSING", "--access-mode ReadWriteOnce"),
        ("my.company/x", "unknown", ""),
    ],
)
def test_the_storage_class_is_judged_by_whether_it_offers_many_writers(
    stub: StubCluster, job: Job, capsys: Output, provisioner: str, mark: str, cure: str
) -> None:
    healthy(stub, provisioner)
    job("doctor")
    line = found(capsys.readouterr().out, "ReadWriteMany")
    assert line.startswith(mark)
    assert cure in line


def test_another_class_that_offers_it_is_named(stub: StubCluster, job: Job, capsys: Output) -> None:
    healthy(stub, "ebs.csi.aws.com")
    stub.add({"kind": "StorageClass", "metadata": {"name": "shared"}, "provisioner": "efs.csi.aws.com"})
    job("doctor")
    assert "--storage-class shared" in found(capsys.readouterr().out, "ReadWriteMany")


@pytest.mark.parametrize(("phase", "mark"), [("Bound", "ok"), ("Pending", "MISSING"), ("Lost", "MISSING")])
def test_a_volume_that_is_there_is_judged_by_its_phase(
    stub: StubCluster, job: Job, capsys: Output, phase: str, mark: str
) -> None:
    healthy(stub)
    [claim] = manifests(JobSpec(), ("volume",))
    stub.add(claim | {"status": {"phase": phase}})
    job("doctor")
    assert found(capsys.readouterr().out, "volume").startswith(mark)


def test_a_job_whose_data_and_run_are_urls_lacks_no_storage(stub: StubCluster, job: Job, capsys: Output) -> None:
    healthy(stub)
    stub.objects = {key: one for key, one in stub.objects.items() if one["kind"] != "StorageClass"}
    assert job("doctor") == 1
    assert found(capsys.readouterr().out, "storage").startswith("MISSING")
    assert job("doctor", "--volume", "") == 0
    assert found(capsys.readouterr().out, "volume").startswith("ok")


def test_images_are_told_of_as_far_as_pods_have_tried(stub: StubCluster, job: Job, capsys: Output) -> None:
    healthy(stub)
    assert job("submit", "--pull-secret", "registry") == 0
    job("doctor")
    assert "no secret registry" in found(capsys.readouterr().out, "image")
    stub.add({"kind": "Secret", "metadata": {"name": "registry", "namespace": "training"}})
    claim = stub.get("PersistentVolumeClaim", "elastic-gpt")
    assert claim
    claim["status"] = {"phase": "Bound"}
    job("doctor")
    assert "no pod has tried" in found(capsys.readouterr().out, "image")
    waiting: dict[str, Any] = {"waiting": {"reason": "ErrImagePull", "message": "not found"}}
    stub.worker("elastic-gpt", 0, "Pending", containerStatuses=[{"name": "main", "state": waiting}])
    assert job("doctor") == 1
    assert "ErrImagePull: not found" in found(capsys.readouterr().out, "image")
    stub.worker(
        "elastic-gpt",
        0,
        "Running",
        containerStatuses=[{"name": "main", "imageID": "sha256:1", "state": {"running": {}}}],
    )
    assert job("doctor") == 0
    assert "was pulled on machine" in found(capsys.readouterr().out, "image")


@pytest.mark.parametrize(
    ("provisioner", "many"),
    [
        ("nfs.csi.k8s.io", True), ("cluster.local/nfs-subdir-external-provisioner", True), ("efs.csi.aws.com", True),
        ("rook-ceph.cephfs.csi.ceph.com", True), ("filestore.csi.storage.gke.io", True), ("file.csi.azure.com", True),
        ("driver.longhorn.io", True),
        ("ebs.csi.aws.com", False), ("kubernetes.io/aws-ebs", False), ("pd.csi.storage.gke.io", False),
        ("disk.csi.azure.com", False), ("rancher.io/local-path", False), ("k8s.io/minikube-hostpath", False),
        ("rook-ceph.rbd.csi.ceph.com", False), ("kubernetes.io/no-provisioner", False), ("example.com/new", None),
    ],
)  # fmt: skip
def test_provisioners_that_are_known_by_name(provisioner: str, many: bool | None) -> None:
    assert offers_many(provisioner) is many


def test_gpus_of_a_cordoned_machine_do_not_count() -> None:
    machine = {"spec": {"unschedulable": True}, "status": {"allocatable": {"nvidia.com/gpu": "8"}}}
    assert allocatable_gpus(machine) == 0
