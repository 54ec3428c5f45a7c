"""examples/elasticjob says what Kubernetes, DLRover and our own command line really take. Needs no cluster."""

import copy
import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml

REPO = Path(__file__).parents[2]
FOLDER = REPO / "examples" / "elasticjob"
CRD = REPO.parent / "shared" / "data" / "crds" / "elastic.iml.github.io_elasticjobs.yaml"
KUBERNETES = "1.32"

Tree = dict[str, Any]

FILES = {path.name: list(yaml.safe_load_all(path.read_text())) for path in sorted(FOLDER.glob("*.yaml"))}
KUSTOMIZATION = FILES.pop("kustomization.yaml")[0]
DOCUMENTS = [document for documents in FILES.values() for document in documents]
ELASTICJOB = next(document for document in DOCUMENTS if document["kind"] == "ElasticJob")
BUILT_IN = [document for document in DOCUMENTS if document is not ELASTICJOB]
PREPARE = next(document for document in DOCUMENTS if document["kind"] == "Job")
TEMPLATES = {name: spec["template"] for name, spec in ELASTICJOB["spec"]["replicaSpecs"].items()}
POD_SPECS = {"prepare": PREPARE["spec"]["template"]["spec"], **{name: t["spec"] for name, t in TEMPLATES.items()}}
MAIN = {name: spec["containers"][0] for name, spec in POD_SPECS.items()}
WORKER = POD_SPECS["worker"]


def as_pod(template: Tree) -> Tree:
    """The pod that is made from a template: a shape that the schemas of Kubernetes know."""
    return {"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}), "spec": template["spec"]}


PODS = [as_pod(template) for template in TEMPLATES.values()]


def validate(document: Tree) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def closed(schema: Any) -> Any:
    """The schema with every object closed to fields that it does not name."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and "additionalProperties" not in schema:
        schema["additionalProperties"] = False
    return schema


@functools.cache
def elasticjob_validator() -> Any:
    validator = pytest.importorskip("openapi_schema_validator").OAS30Validator
    if not CRD.exists():
        pytest.skip(f"no CustomResourceDefinition at {CRD}")
    versions = yaml.safe_load(CRD.read_text())["spec"]["versions"]
    schema = next(version for version in versions if version["name"] == "v1alpha1")["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {}  # the CRD leaves it to the API server, as a bare object
    return validator(closed(schema))


def elasticjob_errors(job: Tree) -> list[str]:
    return [error.message for error in elasticjob_validator().iter_errors(job)]


def misspelt(tree: Tree, free: tuple[str, ...]) -> list[tuple[str, Tree]]:
    """Copies of `tree`, each with one field misspelt; below the fields `free` any name goes."""
    found: list[tuple[str, Tree]] = []

    def walk(node: Any, path: tuple[Any, ...]) -> None:
        if isinstance(node, dict) and not (path and path[-1] in free):
            for key in node:
                broken = copy.deepcopy(tree)
                parent = broken
                for step in path:
                    parent = parent[step]
                parent[f"{key}x"] = parent.pop(key)
                found.append((".".join(map(str, (*path, key))), broken))
        for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            walk(value, (*path, key))

    walk(tree, ())
    return found


def name_of(document: Tree) -> str:
    return f"{document['kind']}-{document['metadata'].get('name', '')}"


@pytest.mark.parametrize("document", [*BUILT_IN, *PODS], ids=name_of)
def test_kubernetes_takes_every_field(document: Tree) -> None:
    validate(document)


@pytest.mark.parametrize("document", [*BUILT_IN, *PODS], ids=name_of)
def test_a_misspelt_field_of_kubernetes_is_caught(document: Tree) -> None:
    missed = []
    for where, broken in misspelt(document, free=("labels", "requests", "limits")):
        if where in ("apiVersion", "kind"):
            continue  # they choose the schema
        try:
            validate(broken)
            missed.append(where)
        except kubernetes_validate.ValidationError:
            pass
    assert not missed


def test_the_elasticjob_crd_takes_every_field() -> None:
    assert elasticjob_errors(ELASTICJOB) == []


def test_a_misspelt_field_of_the_elasticjob_is_caught() -> None:
    # In replicaSpecs any name goes by the schema; "worker" and "dlrover-master" are held by what DLRover reads, below.
    # The pod templates are walked above, against newer schemas.
    free = ("requests", "limits", "replicaSpecs", "metadata", "template")
    cases = [case for case in misspelt(ELASTICJOB, free) if case[0].startswith("spec.") and ".template." not in case[0]]
    assert len(cases) >= 10
    assert [where for where, broken in cases if not elasticjob_errors(broken)] == []


def test_dlrover_reads_what_the_elasticjob_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dlrover")
    from dlrover.python.scheduler import kubernetes as dlrover_kubernetes

    client = SimpleNamespace(get_custom_resource=lambda **_: copy.deepcopy(ELASTICJOB))
    monkeypatch.setattr(dlrover_kubernetes.k8sClient, "singleton_instance", lambda *_: client)
    metadata = ELASTICJOB["metadata"]
    job = dlrover_kubernetes.K8sJobArgs("pyk8s", metadata["namespace"], metadata["name"])
    job.initilize()
    assert (job.distribution_strategy, job.optimize_mode) == ("AllreduceStrategy", "single-job")
    assert set(job.node_args) == {"worker", "dlrover-master"}
    worker = job.node_args["worker"]
    assert (worker.restart_count, worker.auto_scale) == (100, False)
    group = worker.group_resource
    assert group.count == ELASTICJOB["spec"]["replicaSpecs"]["worker"]["replicas"]
    resource = group.node_resource
    assert (resource.cpu, resource.memory, resource.gpu_type, resource.gpu_num) == (4.0, 16384, "nvidia.com/gpu", 1)
    # The master gives the pod limits equal to its requests, whatever the file says; so the file must say the same.
    assert MAIN["worker"]["resources"]["limits"] == MAIN["worker"]["resources"]["requests"]


def test_dlrover_knows_every_argument_of_the_master() -> None:
    pytest.importorskip("dlrover")
    from dlrover.python.master.args import _build_master_args_parser

    args = MAIN["dlrover-master"]["args"]
    assert args[:3] == ["python", "-m", "dlrover.python.master.main"]
    assert importlib.util.find_spec(args[2])
    known, unknown = _build_master_args_parser().parse_known_args(args[3:])  # DLRover itself only warns
    assert unknown == []
    metadata = ELASTICJOB["metadata"]
    assert (known.namespace, known.job_name) == (metadata["namespace"], metadata["name"])
    assert (known.platform, known.port, known.pre_check_ops) == ("pyk8s", 50001, [])


def test_our_command_line_takes_what_prepare_is_given() -> None:
    from elastic_gpt.cli import COMMANDS
    from prepare.prepare import _parse

    program, command, *arguments = MAIN["prepare"]["args"]
    assert (program, COMMANDS[command][0]) == ("elastic-gpt", "prepare.prepare")
    assert _parse(arguments, "prepare").output_dir == Path("/workspace/data")


def test_our_command_line_takes_what_a_worker_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from elastic_gpt import launch
    from elastic_gpt.cli import COMMANDS
    from elastic_gpt.settings import SettingsError, parse
    from model_zoo.nanogpt.config import PRESETS, TrainConfig

    seen: Tree = {}
    monkeypatch.setattr(launch, "run_node", lambda command, **nodes: seen.update(nodes, command=command) or 0)
    program, command, *arguments = MAIN["worker"]["args"]
    assert (program, COMMANDS[command][0]) == ("elastic-gpt", "elastic_gpt.launch")
    assert launch.main(arguments) == 0
    train, *flags = seen.pop("command")
    assert train == "train"

    def settings(flags: list[str]) -> TrainConfig:
        return parse(TrainConfig, flags, presets=PRESETS, prog="elastic-gpt train", environment={})

    config = settings(flags)
    assert (config.data.dir, config.run_dir) == (Path("/workspace/data"), Path("/workspace/run"))
    with pytest.raises(SettingsError):
        settings([*flags, "--optimizer.warmup-stepz=100"])

    replicas = ELASTICJOB["spec"]["replicaSpecs"]["worker"]["replicas"]
    gpus = int(MAIN["worker"]["resources"]["limits"]["nvidia.com/gpu"])
    assert seen == {"least": 2, "most": 4, "workers": gpus}
    assert seen["least"] <= replicas <= seen["most"]


def test_the_kustomization_lists_every_manifest_and_nothing_else() -> None:
    assert sorted(KUSTOMIZATION["resources"]) == sorted(FILES)


def test_one_image_that_the_kustomization_can_rename() -> None:
    images = {c["image"] for spec in POD_SPECS.values() for c in spec["containers"] + spec.get("initContainers", [])}
    [image] = KUSTOMIZATION["images"]
    assert images == {f"{image['name']}:{image['newTag']}"}
    version = re.search(r'^version = "(.+)"', (REPO / "pyproject.toml").read_text(), re.M)
    assert version
    assert image["newTag"] == version[1]


def test_everything_is_in_one_namespace() -> None:
    [namespace] = [document["metadata"]["name"] for document in DOCUMENTS if document["kind"] == "Namespace"]
    assert {d["metadata"].get("namespace", namespace) for d in DOCUMENTS if d["kind"] != "Namespace"} == {namespace}
    assert all("namespace" in d["metadata"] for d in DOCUMENTS if d["kind"] != "Namespace")


@pytest.mark.parametrize("spec", POD_SPECS.values(), ids=POD_SPECS)
def test_a_pod_has_the_volumes_that_it_mounts(spec: Tree) -> None:
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    containers = spec["containers"] + spec.get("initContainers", [])
    assert {mount["name"] for c in containers for mount in c.get("volumeMounts", [])} == set(volumes)
    claims = {document["metadata"]["name"] for document in DOCUMENTS if document["kind"] == "PersistentVolumeClaim"}
    claimed = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
    assert claimed <= claims


@pytest.mark.parametrize("spec", POD_SPECS.values(), ids=POD_SPECS)
def test_every_container_asks_for_cpu_and_memory(spec: Tree) -> None:
    for container in spec["containers"] + spec.get("initContainers", []):
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])  # DLRover's master fails without


@pytest.mark.parametrize("spec", POD_SPECS.values(), ids=POD_SPECS)
def test_a_pod_is_admitted_where_only_restricted_ones_are(spec: Tree) -> None:
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    if spec.get("volumes"):
        assert context["fsGroup"] == context["runAsGroup"]  # else the volume is root's
    for container in spec["containers"] + spec.get("initContainers", []):
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert "command" not in container  # it would replace the image's entrypoint, tini


def test_the_master_alone_has_rights_and_they_are_bound_to_it() -> None:
    kinds = {document["kind"]: document for document in DOCUMENTS}
    account, binding = kinds["ServiceAccount"]["metadata"], kinds["RoleBinding"]
    assert POD_SPECS["dlrover-master"]["serviceAccountName"] == account["name"]
    assert binding["roleRef"]["name"] == kinds["Role"]["metadata"]["name"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
    ]
    for pod in ("prepare", "worker"):
        assert POD_SPECS[pod]["automountServiceAccountToken"] is False


def test_a_worker_has_room_for_its_snapshots() -> None:
    mounts = {mount["mountPath"]: mount["name"] for mount in MAIN["worker"]["volumeMounts"]}
    volume = next(volume for volume in WORKER["volumes"] if volume["name"] == mounts["/dev/shm"])
    assert volume["emptyDir"]["medium"] == "Memory"
    two_snapshots = 2 * 124_439_808 * 3 * 4  # parameters and AdamW's two moments, in float32
    size = int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30
    assert two_snapshots < size < int(MAIN["worker"]["resources"]["limits"]["memory"].removesuffix("Gi")) * 2**30


def test_the_promised_grace_time_is_the_real_one() -> None:
    # DLRover's master clears the field in a worker's pod, and Kubernetes' default is 30 seconds.
    assert WORKER["terminationGracePeriodSeconds"] == 30


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl")
def test_kustomize_builds_it_with_a_text_of_ones_own_as_the_readme_says(tmp_path: Path) -> None:
    folder = tmp_path / "elasticjob"
    shutil.copytree(FOLDER, folder)
    block = re.search(r"```yaml\n(.+?)```", (FOLDER / "README.md").read_text(), re.S)
    assert block
    addition = "".join(line.removeprefix("  ") for line in block[1].splitlines(keepends=True))
    with (folder / "kustomization.yaml").open("a") as kustomization:
        kustomization.write(addition)
    (folder / "data.txt").write_text("BUCKINGHAM:\nWelcome, sweet prince, to London, to your chamber.\n")
    built = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True).stdout
    documents = list(yaml.safe_load_all(built))
    assert len(documents) == len(DOCUMENTS) + 1
    job = next(document for document in documents if document["kind"] == "Job")
    validate(job)
    spec = job["spec"]["template"]["spec"]
    assert {volume["name"] for volume in spec["volumes"]} == {"text", "workspace"}
    assert "/text/data.txt" in spec["containers"][0]["args"]
