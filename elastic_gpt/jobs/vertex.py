"""JobSpec -> requests to Vertex AI: a CustomJob, the model, an endpoint, and the model's deployment there. Plain dicts.

Each is a request message of the API in JSON form, with the name of the message as `kind`.
examples/vertex/send.py sends them. Values that only the user's project knows are <words in
brackets>.
"""

from collections.abc import Callable

from elastic_gpt.jobs import ads
from elastic_gpt.jobs.manifest import Tree
from elastic_gpt.jobs.spec import JobSpec
from elastic_gpt.settings import SettingsError

PARENT = "projects/<project>/locations/<region>"
BUCKET = "gs://<bucket>"
REPLICA = "/opt/elastic-gpt/vertex/replica.py"  # where examples/vertex/Dockerfile puts it
L4_MACHINES = {1: "g2-standard-12", 2: "g2-standard-24", 4: "g2-standard-48", 8: "g2-standard-96"}
CPU_MACHINES = {cpus: f"e2-standard-{cpus}" for cpus in (2, 4, 8, 16, 32)}  # 4 GiB per CPU


def job(spec: JobSpec) -> list[Tree]:
    """Raises SettingsError for what Vertex AI has not: text that is here, a node selector, other machines."""
    ads.check(spec, "Vertex AI", BUCKET, ads.KUBERNETES, mounted="/gcs/")
    pool = {
        "machineSpec": _machine(spec),
        "containerSpec": {
            "imageUri": _image(spec),
            "args": ["python3", REPLICA, *ads.in_bucket(spec.training, BUCKET)],
            "env": [{"name": name, "value": value} for name, value in ads.environment(spec).items()],
        },
    }
    # The first pool always has one replica.
    pools = [{"replicaCount": 1, **pool}] + [{"replicaCount": spec.nodes - 1, **pool}] * (spec.nodes > 1)
    body = {
        "workerPoolSpecs": pools,
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


PARTS: dict[str, Callable[[JobSpec], list[Tree]]] = {
    "job": job,
    "model": model,
    "endpoint": endpoint,
    "deployment": deployment,
}
JOB_PARTS = ("job",)
