"""JobSpec -> the YAML that `ads opctl run -f` takes: a distributed job of OCI Data Science. Plain dicts from pure functions.

ADS starts one main and N workers, clones the repository on each, and runs examples/oci/main.py
there, which starts the elastic run. Values that only the user's tenancy knows are <words in
brackets>.
"""

import shlex
from collections.abc import Callable

from elastic_gpt.jobs.manifest import Tree
from elastic_gpt.jobs.spec import WORKSPACE, JobSpec
from elastic_gpt.settings import SettingsError

HOME = "/home/datascience"  # where the block storage of each node is mounted
SHARED = "/mnt/elastic-gpt"  # a file system that all nodes mount, for run directory and data
BUCKET = "oci://<bucket>@<namespace>"
REPOSITORY = "https://<host>/<you>/elastic-gpt.git"


def job(spec: JobSpec) -> list[Tree]:
    """The job and its environment. Raises SettingsError for local text files, which are not sent to OCI."""
    if spec.upload:
        raise SettingsError(
            f"--text {spec.upload[0][0]}: OCI takes no file from here; name a URL, as {BUCKET}/{spec.upload[0][0]}"
        )
    if spec.network_check or spec.spot or spec.node_selector:
        raise SettingsError("--network-check, --spot, --node-selector: these are Kubernetes'; leave them out for OCI")
    arguments = [
        spec.used_preset,
        f"--data.dir={_there(spec.data_dir)}",
        f"--run-dir={_there(spec.run_dir)}",
        f"--checkpoint.dir={BUCKET}/{spec.name}/checkpoints",
        *spec.arguments,
    ]
    runtime = {
        "apiVersion": "v1",
        "kind": "python",
        "type": "git",
        "spec": {
            "uri": REPOSITORY,
            "branch": "main",
            "entryPoint": "examples/oci/main.py",
            "codeDir": f"{HOME}/elastic-gpt",
            "args": arguments,
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
        "PREPARE": shlex.join(prepare),
    } | dict(spec.env)


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
            "storageMount": [{"src": "<mount target>@<export>", "dest": SHARED}],
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


def _there(path: str) -> str:
    return path.replace(str(WORKSPACE), SHARED)


PARTS: dict[str, Callable[[JobSpec], list[Tree]]] = {"job": job}
