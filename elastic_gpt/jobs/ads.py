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
REPOSITORY = "https://<host>/<you>/elastic-gpt.git"


def job(spec: JobSpec) -> list[Tree]:
    """Raises SettingsError for text that is here, which does not travel to OCI, and for what OCI has not."""
    check_texts(spec, "OCI", BUCKET)
    if spec.network_check or spec.spot or spec.node_selector or spec.env_secret:
        raise SettingsError(
            "--network-check, --spot, --node-selector, --env-secret: these are Kubernetes'; leave them out for OCI"
        )
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
        "RUN_ID": spec.name,
        **({"PREPARE": shlex.join(prepare)} if spec.prepares else {}),
    } | dict(spec.env)


def check_texts(spec: JobSpec, where: str, bucket: str) -> None:
    """Raises SettingsError for a text that nodes without a volume of ours do not see."""
    names = [name for name, _ in spec.upload] + [path for path in spec.texts if "://" not in path]
    if names:
        url = f"{bucket}/{PurePosixPath(names[0]).name}"
        raise SettingsError(f"--text {names[0]}: {where} takes no file from here; name a URL, as {url}")


def in_bucket(words: tuple[str, ...], bucket: str) -> list[str]:
    """`words` with what is on the volume elsewhere in a bucket."""
    return [word.replace(str(WORKSPACE), bucket) for word in words]


def _infrastructure(spec: JobSpec) -> Tree:
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
            "shapeName": f"VM.GPU.A10.{spec.gpus}" if spec.gpus else "VM.Standard.E4.Flex",
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
