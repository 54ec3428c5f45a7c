"""JobSpec -> Kubeflow Trainer v2: a TrainingRuntime and a TrainJob for each step. Plain dicts from pure functions.

The pods are those of manifest.py, with Kubeflow's names. Kubeflow's controller makes them from the
template of the runtime, and sets torchrun's environment in the container `node` (PET_NNODES,
PET_MASTER_ADDR ...). DLRover is not involved.
"""

import re
from collections.abc import Callable
from typing import Any

from elastic_gpt.jobs import manifest
from elastic_gpt.jobs.manifest import Tree
from elastic_gpt.jobs.spec import WORKSPACE, JobSpec

GROUP = "trainer.kubeflow.org"
MOUNT = "/gpt"  # where these pods mount the volume
NODE = "node"  # name of the replicated job and of the container, as Kubeflow's controller expects
LOST_PODS = 100  # failed pods after which the TrainJob fails; a preempted machine costs one


def load_corpus(spec: JobSpec) -> list[Tree]:
    """Turns text into tokens. [] for a job that uses the data of another."""
    jobs = manifest.prepare(spec)
    if not jobs:
        return []
    pod = jobs[0]["spec"]["template"]["spec"]
    return _pair(spec, "load-corpus", pod, ["elastic-gpt", "prepare"], ml={"numNodes": 1}, retries=2)


def train_gpt(spec: JobSpec) -> list[Tree]:
    """The training under torchrun, on spec.min_nodes to spec.nodes nodes, as pods are lost and replaced.

    Raises SettingsError for what only DLRover can do.
    """
    spec.refuse(("max_nodes", "network_check", "oom_restarts"), "without DLRover")
    [job] = manifest.elasticjob(spec)
    pod = job["spec"]["replicaSpecs"]["worker"]["template"]["spec"]
    words = pod["containers"][0]["args"]
    pod["containers"][0]["args"] = ["elastic-gpt", *words[words.index("--") + 1 :]]
    # Kubernetes fills in the variables that Kubeflow's controller sets. The rendezvous is c10d and not the controller's
    # static one: it forms a new world of the pods that are left, and lets a replaced pod join.
    torchrun = [
        *("torchrun", f"--nnodes={spec.min_nodes}:$(PET_NNODES)", "--max-restarts=100"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=$(PET_MASTER_ADDR):$(PET_MASTER_PORT)", f"--rdzv-id={spec.name}"),
        *("--rdzv-conf=last_call_timeout=2,keep_alive_interval=2", "--no-python"),
    ]
    # Torch 2.13: with a shared store, a pod that joins gets no address from a rank 0 that stays.
    pod["containers"][0]["env"].append({"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"})
    ml = {"numNodes": spec.nodes, "torch": {}}
    return _pair(
        spec, "train-gpt", pod, [*torchrun, "elastic-gpt", "train"], ml=ml, retries=LOST_PODS,
        numNodes=spec.nodes, numProcPerNode=spec.workers,
    )  # fmt: skip


def generative_prompt(spec: JobSpec) -> list[Tree]:
    """A pod in which a person talks to the model: `kubectl attach -it`, and `exit` ends the TrainJob."""
    [prompt] = manifest.prompt(spec)
    return _pair(spec, "generative-prompt", prompt["spec"], ["elastic-gpt", "generate"], ml={"numNodes": 1}, retries=0)


PARTS: dict[str, Callable[[JobSpec], list[Tree]]] = {
    "namespace": manifest.namespace,
    "volume": manifest.volume,
    "text": manifest.text,
    "load-corpus": load_corpus,
    "train-gpt": train_gpt,
    "generative-prompt": generative_prompt,
}
"""The parts in the order in which they are applied. The last one needs a trained model."""
JOB_PARTS = ("namespace", "volume", "text", "load-corpus", "train-gpt")


STEPS = ("load-corpus", "train-gpt", "generative-prompt")


def named(job: str, step: str) -> str:
    """Name of the TrainJob of a step. In a job with the default name it is the name of the step."""
    return step if job == JobSpec().name else f"{job}-{step}"


def runtime_of(name: str) -> str:
    """Name of the TrainingRuntime of a TrainJob."""
    return f"{name}-runtime"


def _pair(
    spec: JobSpec, step: str, pod: Tree, command: list[str], *, ml: Tree, retries: int, **trainer: Any
) -> list[Tree]:
    """The TrainingRuntime, which says how a step runs, and a TrainJob, which has its arguments after `command`."""
    name = named(spec.name, step)
    [container] = pod["containers"]
    arguments = container.pop("args")[2:]  # without `elastic-gpt STEP`, with which `command` ends
    container |= {"name": NODE, "command": ["tini", "--", *command]}
    template = {"backoffLimit": retries, "template": {"spec": pod}}
    labels = {f"{GROUP}/trainjob-ancestor-step": "trainer"}
    replicated = {"name": NODE, "template": {"metadata": {"labels": labels}, "spec": template}}
    runtime = {"mlPolicy": ml, "template": {"spec": {"replicatedJobs": [replicated]}}}
    job = {
        "runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": runtime_of(name)},
        "trainer": {**trainer, "args": arguments},
    }
    return [
        remounted(_object(spec, kind, named, {"spec": body}), str(WORKSPACE), MOUNT)
        for kind, named, body in (("TrainingRuntime", runtime_of(name), runtime), ("TrainJob", name, job))
    ]


def _object(spec: JobSpec, kind: str, name: str, rest: Tree) -> Tree:
    metadata = {"name": name, "namespace": spec.namespace, "labels": {manifest.JOB_LABEL: spec.name}}
    return {"apiVersion": f"{GROUP}/v1alpha1", "kind": kind, "metadata": metadata, **rest}


def remounted(node: Any, old: str, new: str) -> Any:
    """`node` with all paths below the mount `old` moved to `new`."""
    if isinstance(node, dict):
        return {key: remounted(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [remounted(value, old, new) for value in node]
    if isinstance(node, str):
        return re.sub(rf"{re.escape(old)}(?=/|$)", new, node)
    return node
