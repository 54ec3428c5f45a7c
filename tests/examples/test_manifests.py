"""The manifests say what Kubernetes, DLRover and our own command line really take. Needs no cluster.

Everything in examples/elasticjob is held against the schemas, and so are jobs with every option there is.
"""

import copy
import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml

from elastic_gpt.jobs.manifest import GROUP, JOB_LABEL, MASTER_RULES, PARTS, manifests
from elastic_gpt.jobs.model import using
from elastic_gpt.jobs.render import to_yaml
from elastic_gpt.jobs.spec import JobSpec
from tests.conftest import TEST_DATA
from tests.examples.schemas import (
    assert_first_line_renders,
    assert_whole,
    crd_validator,
    lacking,
    misspelt,
    unnoticed,
    without,
)

REPO = Path(__file__).parents[2]
FOLDER = REPO / "examples" / "elasticjob"
CRD = TEST_DATA / "crds" / "elastic.iml.github.io_elasticjobs.yaml"
KUBERNETES = "1.32"

Tree = dict[str, Any]

OURS = [path for path in sorted(FOLDER.rglob("*.yaml")) if path.parent.name != "operator"]  # that is test_operator.py's
FILES = {
    str(path.relative_to(FOLDER)): list(yaml.safe_load_all(path.read_text()))
    for path in OURS
    if path.name != "kustomization.yaml"
}
KUSTOMIZATIONS = {path.parent: yaml.safe_load(path.read_text()) for path in OURS if path.name == "kustomization.yaml"}
EVERYTHING = JobSpec(
    name="all",
    namespace="mine",
    image="registry.example.com/gpt:1",
    pull_secret="registry",
    arguments=("--model.n-layer", "24"),
    gpus=8,
    network_check=True,
    spot=True,
    node_selector=(("gpu", "h200"),),
    env=(("NCCL_SOCKET_IFNAME", "eth0"),),
    env_secret="keys",
    volume="big",
    storage_class="nfs",
    texts=("/workspace/c.txt",),
    upload=(("a.txt", "one\ntwo\n"), ("b.txt", "three")),
)
WITHOUT_DLROVER = dataclasses.replace(EVERYTHING, network_check=False)
RENDERED = list(yaml.safe_load_all(to_yaml(manifests(EVERYTHING, tuple(PARTS)))))
DOCUMENTS = {f"{path}:{tree['kind']}": tree for path, trees in FILES.items() for tree in trees}
DOCUMENTS |= {f"every option:{tree['kind']} {tree['metadata']['name']}": tree for tree in RENDERED}
ELASTICJOBS = {where: tree for where, tree in DOCUMENTS.items() if tree["kind"] == "ElasticJob"}
ELASTICJOB = ELASTICJOBS["elasticjob.yaml:ElasticJob"]


def test_the_room_that_the_series_of_sizes_asks_for_is_enough() -> None:
    [told] = re.findall(r"storage: (\d+)Gi", (FOLDER / "sizes" / "kustomization.yaml").read_text())
    specs: list[JobSpec] = []
    for where, tree in ELASTICJOBS.items():
        if where.startswith("sizes/") or tree is ELASTICJOB:
            using(tree, lambda spec: specs.append(spec) or [])
    assert len(specs) == 5
    assert {spec.given("steps") for spec in specs} == {"1000"}  # one checkpoint each, after the last step
    least = sum(12 * spec.parameters for spec in specs) / 2**30
    assert 20 < least < 0.9 * int(told)


def as_pod(template: Tree) -> Tree:
    """The pod that is made from a template: a shape that the schemas of Kubernetes know."""
    return {"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}), "spec": template["spec"]}


BUILT_IN = {where: tree for where, tree in DOCUMENTS.items() if tree["kind"] != "ElasticJob"} | {
    f"{where}:{replica}": as_pod(spec["template"])
    for where, tree in ELASTICJOBS.items()
    for replica, spec in tree["spec"]["replicaSpecs"].items()
}
# Manifests of the same kinds that stand beside Kubeflow's and JobSet's own.
BUILT_IN |= {
    f"{path.parent.name}/{path.name}:{tree['kind']}": tree
    for folder in ("kubeflow", "jobset")
    for path in sorted((REPO / "examples" / folder).glob("*.yaml"))
    for tree in yaml.safe_load_all(path.read_text())
    if tree["kind"] in ("Namespace", "PersistentVolumeClaim", "Job")
}
# What an API server asks for and the schemas do not call required.
API_SERVER = {
    "Namespace": ("metadata.name", "metadata.labels"),
    "PersistentVolumeClaim": (
        *("metadata.name", "metadata.namespace", "spec.accessModes", "spec.resources.requests.storage"),
    ),
    "Job": ("metadata.name", "metadata.namespace", "spec.template.spec.containers.image"),
    "ConfigMap": ("metadata.name", "metadata.namespace", "data"),
    "Deployment": (
        *("metadata.name", "metadata.namespace", "spec.selector.matchLabels", "spec.template.metadata.labels"),
        *(
            f"spec.template.spec.containers.{probe}.httpGet.{field}"
            for probe in ("startupProbe", "livenessProbe", "readinessProbe")
            for field in ("path", "port")
        ),
    ),
    "Service": (*("metadata.name", "metadata.namespace", "spec.selector", "spec.ports.port", "spec.ports.targetPort"),),
}
POD_SPECS = {where: tree["spec"] for where, tree in BUILT_IN.items() if tree["kind"] == "Pod"} | {
    where: tree["spec"]["template"]["spec"] for where, tree in BUILT_IN.items() if tree["kind"] in ("Job", "Deployment")
}

every_elasticjob = pytest.mark.parametrize("job", ELASTICJOBS.values(), ids=ELASTICJOBS)
every_built_in = pytest.mark.parametrize("document", BUILT_IN.values(), ids=BUILT_IN)
every_pod = pytest.mark.parametrize("spec", POD_SPECS.values(), ids=POD_SPECS)


def validate(document: Tree) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def elasticjob_errors(job: Tree) -> list[str]:
    return [error.message for error in crd_validator(CRD).iter_errors(job)]


def containers(spec: Tree) -> list[Tree]:
    return [*spec["containers"], *spec.get("initContainers", [])]


def main_container(job: Tree, replica: str = "worker") -> Tree:
    container: Tree = job["spec"]["replicaSpecs"][replica]["template"]["spec"]["containers"][0]
    return container


@pytest.mark.parametrize("path", FILES)
def test_an_example_is_what_the_command_in_its_first_line_renders(path: str) -> None:
    assert_first_line_renders(FOLDER / path)


@every_built_in
def test_kubernetes_takes_every_field(document: Tree) -> None:
    validate(document)


@every_built_in
def test_a_misspelt_field_of_kubernetes_is_caught(document: Tree) -> None:
    missed = []
    free = ("labels", "requests", "limits", "data", "nodeSelector", "matchLabels")
    free += ("selector",) * (document["kind"] == "Service")  # labels as well, there
    for where, broken in misspelt(document, free=free):
        if where in ("apiVersion", "kind"):
            continue  # they choose the schema
        try:
            validate(broken)
            missed.append(where)
        except kubernetes_validate.ValidationError:
            pass
    assert not missed


@every_elasticjob
def test_the_elasticjob_crd_takes_every_field(job: Tree) -> None:
    assert elasticjob_errors(job) == []


@every_elasticjob
def test_a_misspelt_field_of_the_elasticjob_is_caught(job: Tree) -> None:
    # In replicaSpecs any name goes by the schema; "worker" and "dlrover-master" are held by what DLRover reads, below.
    # The pod templates are walked above, against newer schemas.
    free = ("requests", "limits", "replicaSpecs", "metadata", "template")
    cases = [case for case in misspelt(job, free) if case[0].startswith("spec.") and ".template." not in case[0]]
    assert len(cases) >= 10
    assert [where for where, broken in cases if not elasticjob_errors(broken)] == []


MASTER, WORKER = "spec.replicaSpecs.dlrover-master", "spec.replicaSpecs.worker"
NEEDED = (
    *("metadata.name", "spec.distributionStrategy", "spec.optimizeMode", f"{MASTER}.restartCount"),
    *(f"{WORKER}.{field}" for field in ("replicas", "restartCount")),
    *(f"{MASTER}.template.spec.{field}" for field in ("serviceAccountName", "automountServiceAccountToken")),
    *(f"{one}.template.spec.{field}" for one in (MASTER, WORKER) for field in ("securityContext", "restartPolicy")),
    *(
        f"{one}.template.spec.containers.{field}"
        for one in (MASTER, WORKER)
        for field in ("image", "args", "resources")
    ),
    *(f"{WORKER}.template.spec.{field}" for field in ("initContainers", "volumes", "containers.volumeMounts")),
)


@every_elasticjob
def test_it_has_what_dlrover_and_its_pods_need_and_a_missing_field_is_caught(job: Tree) -> None:
    assert lacking(job, NEEDED) == []
    for path in NEEDED:
        assert path in lacking(without(job, path), NEEDED)


@every_elasticjob
def test_dlrovers_master_keeps_the_secret_of_a_workers_environment(job: Tree) -> None:
    kubernetes = pytest.importorskip("kubernetes").client
    pod = as_pod(job["spec"]["replicaSpecs"]["worker"]["template"])
    answer = SimpleNamespace(data=json.dumps(pod))
    read = kubernetes.ApiClient().deserialize(answer, "V1Pod")  # as DLRover's PodScaler reads the template
    back = kubernetes.ApiClient().sanitize_for_serialization(read)["spec"]["containers"][0]
    assert back.get("envFrom") == main_container(job).get("envFrom")
    assert bool(back.get("envFrom")) == (job["metadata"]["name"] == EVERYTHING.name)


@every_elasticjob
def test_dlrover_reads_what_the_elasticjob_says(job: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dlrover")
    from dlrover.python.scheduler import kubernetes as dlrover_kubernetes

    client = SimpleNamespace(get_custom_resource=lambda **_: copy.deepcopy(job))
    monkeypatch.setattr(dlrover_kubernetes.k8sClient, "singleton_instance", lambda *_: client)
    args = dlrover_kubernetes.K8sJobArgs("pyk8s", job["metadata"]["namespace"], job["metadata"]["name"])
    args.initilize()
    assert (args.distribution_strategy, args.optimize_mode) == ("AllreduceStrategy", "single-job")
    assert set(args.node_args) == {"worker", "dlrover-master"}
    worker = args.node_args["worker"]
    assert (worker.restart_count, worker.auto_scale) == (100, False)
    group = worker.group_resource
    assert group.count == job["spec"]["replicaSpecs"]["worker"]["replicas"]
    resources = main_container(job)["resources"]
    read = group.node_resource
    assert (read.cpu, read.memory) == (
        float(resources["requests"]["cpu"]),
        1024 * int(resources["requests"]["memory"].removesuffix("Gi")),
    )
    assert read.gpu_num == int(resources["requests"].get("nvidia.com/gpu", 0))
    # The master gives the pod limits equal to its requests, whatever the file says; so the file must say the same.
    assert resources["limits"] == resources["requests"]


@every_elasticjob
def test_dlrover_finds_its_containers(job: Tree) -> None:
    # With several containers it takes the one that is called main.
    assert main_container(job)["name"] == "main"
    assert main_container(job, "dlrover-master")["name"] == "main"


@every_elasticjob
def test_the_operator_does_not_lose_sight_of_its_master(job: Tree) -> None:
    # DLRover's operator looks at pods with app.kubernetes.io/name=elasticjob, and copies the job's labels over that.
    assert "app.kubernetes.io/name" not in job["metadata"]["labels"]
    # A service's name: at most 63 characters, a letter first.
    assert re.fullmatch(r"[a-z][-a-z0-9]{0,61}[a-z0-9]", f"elasticjob-{job['metadata']['name']}-dlrover-master")


@every_elasticjob
def test_our_command_line_takes_what_a_master_is_given(job: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    from elastic_gpt.cli import COMMANDS
    from elastic_gpt.nodes import master

    seen: list[str] = []
    monkeypatch.setenv("KUBECONFIG", "set")
    monkeypatch.setattr(master, "_run_dlrover", lambda *words: seen.extend(words) or 0)
    program, command, *arguments = main_container(job, "dlrover-master")["args"]
    assert (program, COMMANDS[command][0]) == ("elastic-gpt", "elastic_gpt.nodes.master")
    pytest.importorskip("dlrover")
    from dlrover.python.master import dist_master
    from dlrover.python.master.node import dist_job_manager

    # main() puts ours in their place; after the test they are DLRover's again.
    monkeypatch.setattr(dist_master, "DistributedJobMaster", dist_master.DistributedJobMaster)
    monkeypatch.setattr(dist_job_manager, "_MAX_POD_RELAUNCH_COUNT", dist_job_manager._MAX_POD_RELAUNCH_COUNT)
    assert master.main(arguments) == 0
    metadata = job["metadata"]
    assert {f"--namespace={metadata['namespace']}", f"--job_name={metadata['name']}"} <= set(seen)


@pytest.mark.parametrize("where", [where for where, tree in DOCUMENTS.items() if tree["kind"] == "Job"])
def test_our_command_line_takes_what_prepare_is_given(where: str) -> None:
    from elastic_gpt.cli import COMMANDS
    from prepare.prepare import _parse

    [container] = POD_SPECS[where]["containers"]
    program, command, *arguments = container["args"]
    assert (program, COMMANDS[command][0]) == ("elastic-gpt", "prepare.prepare")
    name = DOCUMENTS[where]["metadata"]["name"].removesuffix("-prepare")
    assert _parse(arguments, "prepare").output_dir == Path("/workspace") / name / "data"


@pytest.mark.parametrize(
    "where", [where for where, tree in DOCUMENTS.items() if tree["metadata"]["name"].endswith("-prompt")]
)
def test_our_command_line_takes_what_a_prompt_is_given(where: str) -> None:
    pytest.importorskip("torch")
    from model_zoo.nanogpt.generate import _parser

    program, command, *arguments = POD_SPECS[where]["containers"][0]["args"]
    assert (program, command) == ("elastic-gpt", "generate")
    name = DOCUMENTS[where]["metadata"]["name"].removesuffix("-prompt")
    assert _parser("generate").parse_args(arguments).run == f"/workspace/{name}/run"


@pytest.mark.parametrize("where", [where for where, tree in DOCUMENTS.items() if tree["kind"] == "Deployment"])
def test_our_command_line_takes_what_a_server_is_given_and_its_service_finds_it(where: str) -> None:
    pytest.importorskip("torch")
    from model_zoo.nanogpt.serving.completions import Limits
    from model_zoo.nanogpt.serving.serve import TOKEN, _parser

    deployment = DOCUMENTS[where]
    service = DOCUMENTS[
        f"{where.partition(':')[0]}:Service" + deployment["metadata"]["name"].join([" ", ""]) * ("every" in where)
    ]
    [container] = POD_SPECS[where]["containers"]
    program, command, *arguments = container["args"]
    assert (program, command) == ("elastic-gpt", "serve")
    options = _parser("serve").parse_args(arguments)
    name = deployment["metadata"]["name"].removesuffix("-serve")
    assert (options.model, options.name, options.follow) == (f"/workspace/{name}/run", name, True)
    assert (options.host, options.port) == ("0.0.0.0", None)
    [port] = container["ports"]
    assert port["containerPort"] == 8080  # the command's own
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert JOB_LABEL not in labels  # the client would take it for a pod of the job
    assert TOKEN in [variable["name"] for variable in container["env"]]
    grace = POD_SPECS[where]["terminationGracePeriodSeconds"]
    sleep, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert (sleep, grace > Limits.seconds + int(seconds)) == ("sleep", True)


@every_elasticjob
def test_our_command_line_takes_what_a_worker_is_given(job: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from elastic_gpt.cli import COMMANDS
    from elastic_gpt.nodes import launch
    from elastic_gpt.settings import SettingsError, parse
    from model_zoo.nanogpt.config import PRESETS, TrainConfig
    from model_zoo.nanogpt.model import GPT

    seen: Tree = {}
    monkeypatch.setattr(launch, "run_node", lambda command, **nodes: seen.update(nodes, command=command) or 0)
    program, command, *arguments = main_container(job)["args"]
    assert (program, COMMANDS[command][0]) == ("elastic-gpt", "elastic_gpt.nodes.launch")
    assert launch.main(arguments) == 0
    train, *flags = seen.pop("command")
    assert train == "train"

    def settings(flags: list[str]) -> TrainConfig:
        return parse(TrainConfig, flags, presets=PRESETS, prog="elastic-gpt train", environment={})

    config = settings(flags)
    [waiting] = job["spec"]["replicaSpecs"]["worker"]["template"]["spec"]["initContainers"]
    assert f"test -e {config.data.dir}/meta.json" in waiting["args"][-1]
    assert config.run_dir == Path("/workspace") / job["metadata"]["name"] / "run"
    with pytest.raises(SettingsError):
        settings([*flags, "--optimizer.warmup-stepz=100"])

    replicas = job["spec"]["replicaSpecs"]["worker"]["replicas"]
    gpus = int(main_container(job)["resources"]["limits"].get("nvidia.com/gpu", 1))
    assert (seen["least"], seen["most"], seen["workers"]) == (1, 4, gpus)
    assert seen["least"] <= replicas <= seen["most"]

    # A worker has room for its snapshots: two of them, of the parameters and AdamW's two moments in float32.
    import torch

    with torch.device("meta"):
        model = GPT(type(config.model)(**{**vars(config.model), "vocab_size": config.model.vocab_size or 50257}))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    spec = job["spec"]["replicaSpecs"]["worker"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in main_container(job)["volumeMounts"]}
    volume = next(volume for volume in spec["volumes"] if volume["name"] == mounts["/dev/shm"])
    assert volume["emptyDir"]["medium"] == "Memory"
    size = int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi"))
    assert 2 * 12 * parameters < size * 2**30
    assert size < int(main_container(job)["resources"]["limits"]["memory"].removesuffix("Gi"))


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda folder: str(folder.relative_to(FOLDER)))
def test_a_kustomization_lists_every_manifest_beside_it_but_what_uses_the_model(folder: Path) -> None:
    listed = {name for name in KUSTOMIZATIONS[folder]["resources"] if name.endswith(".yaml")}
    assert listed == {path.name for path in folder.glob("*.yaml")} - {
        "kustomization.yaml",
        "prompt-pod.yaml",
        "serve.yaml",
    }


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda folder: str(folder.relative_to(FOLDER)))
def test_one_image_that_a_kustomization_can_rename(folder: Path) -> None:
    version = re.search(r'^version = "(.+)"', (REPO / "pyproject.toml").read_text(), re.M)
    assert version
    names = {
        container["image"]
        for where, spec in POD_SPECS.items()
        if not where.startswith("every option") and (FOLDER / where.partition(":")[0]).parent == folder
        for container in containers(spec)
    }
    for image in KUSTOMIZATIONS[folder].get("images", []):
        assert names == {f"{image['name']}:{image['newTag']}"}
        assert image["newTag"].removesuffix("-cpu") == version[1]


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl")
@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda folder: str(folder.relative_to(FOLDER)))
def test_kustomize_builds_each_folder_and_renames_all_images(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "elasticjob"
    shutil.copytree(FOLDER, copied)
    kustomization = copied / folder.relative_to(FOLDER) / "kustomization.yaml"
    kustomization.write_text(
        kustomization.read_text().replace("newName: elastic-gpt", "newName: registry.example.com/gpt")
    )
    built = kustomize(kustomization.parent)
    names = [(document["kind"], document["metadata"]["name"]) for document in built]
    assert ("ServiceAccount", "elastic-gpt-master") in names
    assert len(names) == len(set(names))
    images = re.findall(r"image: (.+)", yaml.safe_dump(built))
    assert all(image.startswith("registry.example.com/gpt:0.1.0") for image in images)
    assert images or folder.name == "shared"
    accounts = {document["metadata"].get("namespace", "training") for document in built}
    assert accounts == {"training"}


@every_pod
def test_a_pod_is_whole_and_admitted_where_only_restricted_ones_are(spec: Tree) -> None:
    assert_whole(spec)
    assert not any("command" in container for container in containers(spec))  # it would replace the image's tini
    claims = {tree["metadata"]["name"] for tree in BUILT_IN.values() if tree["kind"] == "PersistentVolumeClaim"}
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in spec["volumes"]
        if len(volume) == 2 and "persistentVolumeClaim" in volume
    }
    assert used <= claims


@every_pod
def test_a_field_that_is_missing_from_a_pod_is_caught(spec: Tree) -> None:
    assert unnoticed(spec, lambda broken: validate(as_pod({"spec": broken}))) == []


@pytest.mark.parametrize("where", [where for where, tree in BUILT_IN.items() if tree["kind"] in API_SERVER])
def test_it_has_what_the_api_server_asks_for_and_a_missing_field_is_caught(where: str) -> None:
    tree = BUILT_IN[where]
    needed = API_SERVER[tree["kind"]]
    assert lacking(tree, needed) == []
    for path in needed:
        assert path in lacking(without(tree, path), needed)


@every_pod
def test_the_master_alone_has_rights(spec: Tree) -> None:
    master = spec["containers"][0]["args"][1] == "master"
    assert spec["automountServiceAccountToken"] is master
    assert ("serviceAccountName" in spec) is master


def test_the_rights_are_bound_to_the_masters_account() -> None:
    kinds = {tree["kind"]: tree for tree in FILES["shared/rbac.yaml"]}
    account, binding = kinds["ServiceAccount"]["metadata"], kinds["RoleBinding"]
    master = ELASTICJOB["spec"]["replicaSpecs"]["dlrover-master"]["template"]["spec"]
    assert master["serviceAccountName"] == account["name"]
    assert binding["roleRef"]["name"] == kinds["Role"]["metadata"]["name"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
    ]


def test_the_rights_are_what_dlrovers_calls_need() -> None:
    """The calls of dlrover.python.scheduler.kubernetes that a pyk8s master makes, and what each needs."""
    kubernetes = pytest.importorskip("dlrover.python.scheduler.kubernetes")
    needed = {
        "list_namespaced_pod": ("pods", "list"), "create_pod": ("pods", "create"), "get_pod": ("pods", "get"),
        "delete_pod": ("pods", "delete"), "create_service": ("services", "create"), "get_service": ("services", "get"),
        "patch_service": ("services", "patch"), "get_custom_resource": ("elasticjobs", "get"),
    }  # fmt: skip
    assert all(hasattr(kubernetes.k8sClient, call) for call in needed)
    granted = {(name, verb) for rule in MASTER_RULES for name in rule["resources"] for verb in rule["verbs"]}
    watched = {
        ("elasticjobs/status", "patch"),  # ours: nodes/master.py heals it
        ("pods", "watch"),
        ("elasticjobs", "list"),
        ("elasticjobs", "watch"),
        ("elasticjobs/finalizers", "update"),
    }
    assert granted == set(needed.values()) | watched
    assert {group for rule in MASTER_RULES for group in rule["apiGroups"]} == {"", GROUP}


@every_elasticjob
def test_the_promised_grace_time_is_the_real_one(job: Tree) -> None:
    # DLRover's master clears the field in a worker's pod, and Kubernetes' default is 30 seconds.
    assert job["spec"]["replicaSpecs"]["worker"]["template"]["spec"]["terminationGracePeriodSeconds"] == 30


def test_spot_machines_are_tolerated_and_preferred_by_workers_and_avoided_by_the_master() -> None:
    replicas = FILES["spot/elasticjob.yaml"][0]["spec"]["replicaSpecs"]
    worker, master = (replicas[name]["template"]["spec"] for name in ("worker", "dlrover-master"))
    assert {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"} in worker[
        "tolerations"
    ]
    assert "tolerations" not in master

    def operators(spec: Tree) -> set[str]:
        terms = spec["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        return {word["operator"] for term in terms for word in term["preference"]["matchExpressions"]}

    assert (operators(worker), operators(master)) == ({"In"}, {"NotIn"})


def kustomize(folder: Path) -> list[Tree]:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


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
    job = next(document for document in kustomize(folder) if document["kind"] == "Job")
    validate(job)
    spec = job["spec"]["template"]["spec"]
    assert {volume["name"] for volume in spec["volumes"]} == {"text", "workspace", "scratch"}
    assert "/text/data.txt" in spec["containers"][0]["args"]
