"""JobSpec -> Kubeflow Trainer v2: a TrainingRuntime and a TrainJob for each step. Plain dicts from pure functions.

The pods are those of manifest.py, under Kubeflow's names: its controller makes them from the
template of the runtime, and gives the container `node` torchrun's environment (PET_NNODES,
PET_MASTER_ADDR ...). There is no DLRover in it.
"""

import re
from collections.abc import Callable
from typing import Any

from elastic_gpt.jobs import manifest
from elastic_gpt.jobs.manifest import Tree
from elastic_gpt.jobs.spec import WORKSPACE, JobSpec

GROUP = "trainer.kubeflow.org"
MOUNT = "/gpt"  # where these pods see the volume
NODE = "node"  # the replicated job and the container that Kubeflow's controller looks for
LOST_PODS = 100  # pods that may fail before the TrainJob does; a preempted machine costs one


def load_corpus(spec: JobSpec) -> list[Tree]:
    """Text to tokens, once. None for a job that takes the data of another."""
    jobs = manifest.prepare(spec)
    if not jobs:
        return []
    pod = jobs[0]["spec"]["template"]["spec"]
    return _pair(spec, "load-corpus", pod, ["elastic-gpt", "prepare"], ml={"numNodes": 1}, retries=2)


def train_gpt(spec: JobSpec) -> list[Tree]:
    """The training, under torchrun: between spec.min_nodes and spec.nodes, as pods are lost and replaced."""
    [job] = manifest.elasticjob(spec)
    pod = job["spec"]["replicaSpecs"]["worker"]["template"]["spec"]
    words = pod["containers"][0]["args"]
    pod["containers"][0]["args"] = ["elastic-gpt", *words[words.index("--") + 1 :]]
    # Kubernetes puts in what Kubeflow's controller sets. c10d, not the controller's static rendezvous: it forms a new
    # world of those who are there, and lets the pod that replaces a lost one join it.
    torchrun = [
        *("torchrun", f"--nnodes={spec.min_nodes}:$(PET_NNODES)", "--max-restarts=100"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=$(PET_MASTER_ADDR):$(PET_MASTER_PORT)", f"--rdzv-id={spec.name}"),
        *("--rdzv-conf=last_call_timeout=2,keep_alive_interval=2", "--no-python"),
    ]
    # Torch 2.13: with a shared store, a rank 0 that stays tells a pod that joins no address of the next world.
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
"""In the order in which they are applied; the last one when there is a model to talk to."""
JOB_PARTS = ("volume", "text", "load-corpus", "train-gpt")


STEPS = ("load-corpus", "train-gpt", "generative-prompt")


def named(job: str, step: str) -> str:
    """The TrainJob of a step; those of the job that nobody named are called as the steps are."""
    return step if job == JobSpec().name else f"{job}-{step}"


def runtime_of(name: str) -> str:
    """The TrainingRuntime of a TrainJob."""
    return f"{name}-runtime"


def _pair(
    spec: JobSpec, step: str, pod: Tree, command: list[str], *, ml: Tree, retries: int, **trainer: Any
) -> list[Tree]:
    """How a step runs (TrainingRuntime), and one run of it (TrainJob), which has the arguments after `command`."""
    name = named(spec.name, step)
    [container] = pod["containers"]
    arguments = container.pop("args")[2:]  # after `elastic-gpt STEP`, which `command` ends with
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
    """`node` with what is mounted at `old` at `new`."""
    if isinstance(node, dict):
        return {key: remounted(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [remounted(value, old, new) for value in node]
    if isinstance(node, str):
        return re.sub(rf"{re.escape(old)}(?=/|$)", new, node)
    return node
