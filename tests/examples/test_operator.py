"""The kustomization of DLRover's operator, as kubectl renders it: of stand-ins for its files, for a test has no network."""

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_gpt.jobs.client import INSTALL_DEFINITION, INSTALL_OPERATOR, OPERATOR_VERSION
from elastic_gpt.jobs.operator import NAME, PODS

REPO = Path(__file__).parents[2]
FOLDER = REPO / "elastic_gpt" / "jobs" / "install"
ADDRESS = re.compile(r"https://raw\.githubusercontent\.com/intelligent-machine-learning/dlrover/(?P<version>[^/]+)/\S+")
MANAGER = [
    "--health-probe-bind-address=:8081", "--metrics-bind-address=127.0.0.1:8080", "--leader-elect",
    "--leader-elect-lease-duration=30s", "--leader-elect-renew-deadline=20s", "--leader-elect-retry-period=5s",
    "--master-image=registry.example.com/dlrover:master",
]  # fmt: skip

Tree = dict[str, Any]

needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl")


def theirs(arguments: list[str]) -> dict[str, Tree]:
    """What DLRover's files are called at this version, and as much of their content as the kustomization looks at."""
    account = {"kind": "ServiceAccount", "name": NAME, "namespace": "dlrover"}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "dlrover-manager-role"}
    containers = [
        {"name": "kube-rbac-proxy", "image": "docker.io/kubebuilder/kube-rbac-proxy:v0.13.1", "args": ["--v=0"]},
        {"name": "manager", "image": "easydl/elasticjob-controller:master", "command": ["/manager"], "args": arguments},
    ]
    pod = {"metadata": {"labels": {"control-plane": "controller-manager"}}, "spec": {"containers": containers}}
    definition = {"group": "elastic.iml.github.io", "names": {"kind": "ElasticJob", "plural": "elasticjobs"}}
    return {
        "elastic.iml.github.io_elasticjobs.yaml": made("apiextensions.k8s.io/v1", "CustomResourceDefinition",
                                                       "elasticjobs.elastic.iml.github.io", spec=definition),
        "namespace.yaml": made("v1", "Namespace", "dlrover"),
        "service-account.yaml": made("v1", "ServiceAccount", NAME),
        "cluster-role.yaml": made("rbac.authorization.k8s.io/v1", "ClusterRole", "dlrover-manager-role"),
        "cluster-role-binding.yaml": made("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "dlrover-manager-rolebinding",
                                          roleRef=reference, subjects=[account]),
        "role.yaml": made("rbac.authorization.k8s.io/v1", "Role", "dlrover-leader-election-role"),
        "role-binding.yaml": made("rbac.authorization.k8s.io/v1", "RoleBinding", "dlrover-leader-election-rolebinding",
                                  roleRef=reference | {"kind": "Role"}, subjects=[account]),
        "service.yaml": made("v1", "Service", "dlrover-controller-manager-metrics-service"),
        "deployment.yaml": made("apps/v1", "Deployment", NAME, spec={"replicas": 1, "template": pod}),
    }  # fmt: skip


def made(version: str, kind: str, name: str, **rest: Any) -> Tree:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}, **rest}


def render(
    tmp_path: Path, arguments: list[str], change: tuple[str, str] = ("", "")
) -> subprocess.CompletedProcess[str]:
    folder = tmp_path / "operator"
    shutil.copytree(FOLDER, folder)
    for name, tree in theirs(arguments).items():
        (folder / name).write_text(yaml.safe_dump(tree))
    file = folder / "kustomization.yaml"
    file.write_text(ADDRESS.sub(lambda match: match[0].rpartition("/")[2], file.read_text()).replace(*change))
    return subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)


@needs_kubectl
def test_the_manager_has_no_flag_that_its_binary_does_not_know(tmp_path: Path) -> None:
    done = render(tmp_path, MANAGER)
    assert done.returncode == 0, done.stderr
    trees = list(yaml.safe_load_all(done.stdout))
    [deployment] = [tree for tree in trees if tree["kind"] == "Deployment"]
    proxy, manager = deployment["spec"]["template"]["spec"]["containers"]
    assert manager["args"] == [*MANAGER[:3], MANAGER[6]]
    assert proxy["args"] == ["--v=0"]
    assert {"CustomResourceDefinition", "Namespace", "ServiceAccount", "Service"} <= {tree["kind"] for tree in trees}
    # The doctor finds it by these.
    assert deployment["metadata"]["name"] == NAME
    key, _, value = PODS.partition("=")
    assert deployment["spec"]["template"]["metadata"]["labels"][key] == value


@needs_kubectl
@pytest.mark.parametrize("arguments", [MANAGER[:2] + MANAGER[3:], [*MANAGER[:3], MANAGER[6]]])
def test_another_order_of_the_flags_is_an_error_and_takes_none_away(tmp_path: Path, arguments: list[str]) -> None:
    assert render(tmp_path, arguments).returncode != 0


@needs_kubectl
@pytest.mark.parametrize("image", ["easydl/elasticjob-controller", "docker.io/kubebuilder/kube-rbac-proxy"])
def test_an_image_comes_from_ones_own_registry_by_one_word(tmp_path: Path, image: str) -> None:
    done = render(tmp_path, MANAGER, (f"newName: {image}", "newName: registry.example.com/mirror"))
    assert done.returncode == 0, done.stderr
    images = re.findall(r"image: (.+)", done.stdout)
    assert len(images) == 2
    assert len([one for one in images if one.startswith("registry.example.com/mirror:")]) == 1
    assert not any(one.startswith(image) for one in images)


@needs_kubectl
def test_the_operator_may_write_events_where_jobs_are(tmp_path: Path) -> None:
    trees = {
        (tree["kind"], tree["metadata"]["name"]): tree for tree in yaml.safe_load_all(render(tmp_path, MANAGER).stdout)
    }
    assert trees["ClusterRole", "dlrover-manager-events"]["rules"][0]["resources"] == ["events"]
    binding = trees["ClusterRoleBinding", "dlrover-manager-events"]
    assert binding["roleRef"]["name"] == "dlrover-manager-events"
    account = trees["ServiceAccount", NAME]["metadata"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
    ]


def test_all_files_are_of_the_version_that_the_client_is_made_for_and_the_definition_is_the_newer_one() -> None:
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    addresses = [one for one in listed if one.startswith("https:")]
    assert {match["version"] for one in addresses if (match := ADDRESS.fullmatch(one))} == {OPERATOR_VERSION}
    assert [one for one in addresses if "/crd/" in one] == [INSTALL_DEFINITION.rpartition(" ")[2]]
    assert not any(one.endswith("/bases/crd.yaml") for one in addresses)
    assert {one.rpartition("/")[2] for one in addresses} == set(theirs(MANAGER))
    assert {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"} == set(listed) - set(addresses)


def test_the_command_that_the_client_gives_names_this_folder_wherever_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    *command, folder = shlex.split(INSTALL_OPERATOR)
    assert command == ["kubectl", "apply", "-k"]
    assert Path(folder).is_absolute()
    assert Path(folder).samefile(FOLDER)


def test_the_example_is_the_same_folder() -> None:
    example = REPO / "examples" / "elasticjob" / "operator"
    [base] = yaml.safe_load((example / "kustomization.yaml").read_text())["resources"]
    assert (example / base).samefile(FOLDER)


def test_an_installation_without_a_checkout_has_the_folder() -> None:
    data = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    [pattern] = data["elastic_gpt.jobs"]
    assert sorted((FOLDER.parent).glob(pattern)) == sorted(path for path in FOLDER.iterdir() if path.is_file())
