"""JobSpec -> requests to Vertex AI: a CustomJob, the model, an endpoint, and the model's deployment there. Plain dicts.

Each is a request message of the API in JSON form, with the name of the message as `kind`.
examples/vertex/send.py sends them. Values that only the user's project knows are <words in
brackets>.
"""

from collections.abc import Callable

from elastic_gpt.jobs import ads
from elastic_gpt.jobs.manifest import Tree
from elastic_gpt.jobs.spec import WORKSPACE, JobSpec
from elastic_gpt.settings import SettingsError

PARENT = "projects/<project>/locations/<region>"
BUCKET = "gs://<bucket>"
FOLDER = "elastic-gpt"  # the folder below /mnt/nfs, where Vertex AI mounts file systems
REPLICA = "/opt/elastic-gpt/vertex/replica.py"  # its place in the image of examples/vertex/Dockerfile
L4_MACHINES = {1: "g2-standard-12", 2: "g2-standard-24", 4: "g2-standard-48", 8: "g2-standard-96"}
CPU_MACHINES = {cpus: f"e2-standard-{cpus}" for cpus in (2, 4, 8, 16, 32)}  # 4 GiB per CPU


def job(spec: JobSpec) -> list[Tree]:
    """The CustomJob. Raises SettingsError for what Vertex AI cannot do: local text files, a node selector, other machines."""
    if spec.upload:
        raise SettingsError(
            f"--text {spec.upload[0][0]}: Vertex AI takes no file from here; name a URL, as {BUCKET}/{spec.upload[0][0]}"
        )
    if spec.network_check or spec.node_selector:
        raise SettingsError("--network-check, --node-selector: these are Kubernetes'; leave them out for Vertex AI")
    arguments = [
        *("python3", REPLICA, spec.used_preset),
        f"--data.dir={_there(spec.data_dir)}",
        f"--run-dir={_there(spec.run_dir)}",
        f"--checkpoint.dir={BUCKET}/{spec.name}/checkpoints",
        *spec.arguments,
    ]
    pool = {
        "machineSpec": _machine(spec),
        "nfsMounts": [{"server": "<address of the Filestore>", "path": "<its share>", "mountPoint": FOLDER}],
        "containerSpec": {
            "imageUri": _image(spec),
            "args": arguments,
            "env": [{"name": name, "value": value} for name, value in ads.environment(spec).items()],
        },
    }
    # The first pool always has one replica.
    pools = [{"replicaCount": 1, **pool}] + [{"replicaCount": spec.nodes - 1, **pool}] * (spec.nodes > 1)
    body = {
        "workerPoolSpecs": pools,
        "network": "projects/<number of the project>/global/networks/<network>",
        **({"scheduling": {"strategy": "SPOT"}} if spec.spot else {}),
    }
    tree = {"displayName": spec.name, "jobSpec": body}
    return [{"kind": "CreateCustomJobRequest", "parent": PARENT, "customJob": tree}]


def model(spec: JobSpec) -> list[Tree]:
    """The exported model, and the container that serves it."""
    container = {
        "imageUri": _image(spec),
        "args": ["elastic-gpt", "serve"],
        "ports": [{"containerPort": 8080}],
        "healthRoute": "/health",
        "predictRoute": "/predict",
    }
    tree = {"displayName": spec.name, "artifactUri": f"{BUCKET}/{spec.name}/model", "containerSpec": container}
    return [{"kind": "UploadModelRequest", "parent": PARENT, "model": tree}]


def endpoint(spec: JobSpec) -> list[Tree]:
    return [{"kind": "CreateEndpointRequest", "parent": PARENT, "endpoint": {"displayName": spec.name}}]


def deployment(spec: JobSpec) -> list[Tree]:
    """Deploys the model on the endpoint, on one machine of the kind that trained it."""
    resources = {"machineSpec": _machine(spec), "minReplicaCount": 1, "maxReplicaCount": 1}
    tree = {"model": "<model>", "displayName": spec.name, "dedicatedResources": resources}
    return [{"kind": "DeployModelRequest", "endpoint": "<endpoint>", "deployedModel": tree, "trafficSplit": {"0": 100}}]


def _machine(spec: JobSpec) -> Tree:
    if not spec.gpus:
        enough = [name for cpus, name in CPU_MACHINES.items() if cpus >= max(spec.used_cpus, spec.memory_gib / 4)]
        if not enough:
            raise SettingsError(
                f"--cpus, --memory: Vertex AI's largest machine here is {CPU_MACHINES[32]}; ask for less"
            )
        return {"machineType": enough[0]}
    if spec.gpus not in L4_MACHINES:
        raise SettingsError(f"--gpus {spec.gpus}: machines on Vertex AI have 1, 2, 4 or 8")
    return {"machineType": L4_MACHINES[spec.gpus], "acceleratorType": "NVIDIA_L4", "acceleratorCount": spec.gpus}


def _image(spec: JobSpec) -> str:
    return spec.image or f"<region>-docker.pkg.dev/<project>/<repository>/{spec.used_image}"


def _there(path: str) -> str:
    return path.replace(str(WORKSPACE), f"/mnt/nfs/{FOLDER}")


PARTS: dict[str, Callable[[JobSpec], list[Tree]]] = {
    "job": job,
    "model": model,
    "endpoint": endpoint,
    "deployment": deployment,
}
JOB_PARTS = ("job",)
