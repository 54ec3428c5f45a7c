"""JobSpec -> the YAML that `ads opctl run -f` takes: a distributed job of OCI Data Science. Plain dicts from pure functions.

ADS starts one main and N workers, clones the repository on each, and runs examples/oci/main.py
there, which starts the elastic run. Values that only the user's tenancy knows are <words in
brackets>.
"""

import shlex
from collections.abc import Callable
from pathlib import PurePosixPath

from elastic_gpt.jobs.manifest import Tree
from elastic_gpt.jobs.spec import WORKSPACE, JobSpec
from elastic_gpt.settings import SettingsError

HOME = "/home/datascience"  # where the block storage of each node is mounted
BUCKET = "oci://<bucket>@<namespace>"
SHAPES = {0: "VM.Standard.E4.Flex", 1: "VM.GPU.A10.1", 2: "VM.GPU.A10.2", 4: "BM.GPU.A10.4"}  # by GPUs
# Fields of JobSpec that only DLRover or Kubernetes can heed.
KUBERNETES = (
    *("namespace", "pull_secret", "max_nodes", "oom_restarts", "network_check", "node_selector", "env_secret"),
    *("volume", "volume_size", "access_mode", "storage_class"),
)
REPOSITORY = "https://<host>/<you>/elastic-gpt.git"


def job(spec: JobSpec) -> list[Tree]:
    """Raises SettingsError for text and places that are here, which do not travel to OCI, and for what OCI has not."""
    check(spec, "OCI", BUCKET, (*KUBERNETES, "spot"))
    runtime = {
        "apiVersion": "v1",
        "kind": "python",
        "type": "git",
        "spec": {
            "uri": REPOSITORY,
            "branch": "main",
            "entryPoint": "examples/oci/main.py",
            "codeDir": f"{HOME}/elastic-gpt",
            "args": in_bucket(spec.training, BUCKET),
            "env": [{"name": name, "value": value} for name, value in environment(spec).items()],
        },
    }
    body = {"infrastructure": _infrastructure(spec), "cluster": _cluster(spec), "runtime": runtime}
    return [{"kind": "distributed", "apiVersion": "v1", "spec": body}]


def environment(spec: JobSpec) -> dict[str, str]:
    """The environment variables that the scripts in examples/torchrun/ read on each node."""
    prepare = [*(spec.texts or ["--sample"]), f"--tokenizer={spec.tokenizer}"]
    prepare += [f"--vocab-size={spec.vocab_size}"] if spec.vocab_size else []
    return {
        "PROCESSES": str(spec.workers),
        "NODES": f"{spec.min_nodes}:{spec.nodes}",
        **({"PREPARE": shlex.join(prepare)} if spec.prepares else {}),
    } | dict(spec.env)


def check(spec: JobSpec, where: str, bucket: str, unknown: tuple[str, ...], mounted: str = "") -> None:
    """Raises SettingsError for what nodes without a volume of ours do not see, and for options `unknown` there.

    Args:
        mounted: beginning of the paths that the machines of `where` mount themselves.
    """
    spec.refuse(unknown, f"on {where}")
    if spec.gpus:
        spec.refuse(("cpus", "memory"), f"on {where} beside GPUs, whose machines have a size of their own")
    names = [name for name, _ in spec.upload] + [path for path in spec.texts if "://" not in path]
    if names:
        url = f"{bucket}/{PurePosixPath(names[0]).name}"
        raise SettingsError(f"--text {names[0]}: {where} takes no file from here; name a URL, as {url}")
    for flag in ("data.dir", "run_dir", "checkpoint.dir"):
        place = spec.given(flag)
        if place and "://" not in place and not (mounted and place.startswith(mounted)):
            url = f"{bucket}/{PurePosixPath(place).name}"
            raise SettingsError(
                f"--{flag.replace('_', '-')} {place}: a folder of one machine, which the others do not see and which is"
                f" gone with it; name a URL, as {url}"
            )


def in_bucket(words: tuple[str, ...], bucket: str) -> list[str]:
    """`words` with what is on the volume elsewhere in a bucket."""
    return [word.replace(str(WORKSPACE), bucket) for word in words]


def _infrastructure(spec: JobSpec) -> Tree:
    if spec.gpus not in SHAPES:
        raise SettingsError(f"--gpus {spec.gpus}: shapes with A10s on OCI have 1, 2 or 4")
    return {
        "kind": "infrastructure",
        "type": "dataScienceJob",
        "apiVersion": "v1",
        "spec": {
            "projectId": "<ocid of the project>",
            "compartmentId": "<ocid of the compartment>",
            "subnetId": "<ocid of the subnet>",
            "displayName": spec.name,
            "logGroupId": "<ocid of the log group>",
            "shapeName": SHAPES[spec.gpus],
            **({} if spec.gpus else {"shapeConfigDetails": {"ocpus": spec.used_cpus, "memoryInGBs": spec.memory_gib}}),
            "blockStorageSize": 50,
        },
    }


def _cluster(spec: JobSpec) -> Tree:
    # There is always one main node. With one node in all, ADS wants no section for workers.
    worker = {"worker": {"name": "worker", "replicas": spec.nodes - 1}} if spec.nodes > 1 else {}
    return {
        "kind": "PYTORCH",
        "apiVersion": "v1",
        "spec": {
            "image": spec.image or f"<region>.ocir.io/<tenancy>/{spec.used_image}",
            "workDir": f"{BUCKET}/{spec.name}",
            "name": spec.name,
            "main": {"name": "main", "replicas": 1},
            **worker,
        },
    }


PARTS: dict[str, Callable[[JobSpec], list[Tree]]] = {"job": job}
