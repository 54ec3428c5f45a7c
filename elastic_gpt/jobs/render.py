"""Plain dicts -> YAML, with comments that explain fields."""

from collections.abc import Iterator
from typing import Any

import yaml

from elastic_gpt.jobs.manifest import Tree

_MASTER = "spec/replicaSpecs/dlrover-master"
_WORKER = "spec/replicaSpecs/worker"
_POD = f"{_WORKER}/template/spec"
_MAIN = f"{_POD}/containers/main"

# Comments by kind and path. An element of a list is named by its name, or a flag without its value.
NOTES: dict[str, dict[str, str]] = {
    "Namespace": {
        "": "The jobs' own namespace. DLRover's operator lives in `dlrover` and looks into all of them.",
        "metadata/labels": "All pods run without root and without privileges; the API server refuses one that would not.",
    },
    "PersistentVolumeClaim": {
        "": "One volume for all pods: /workspace/JOB/data (tokens) and /workspace/JOB/run (checkpoints, metrics, ledger).",
        "spec/accessModes": "ReadWriteMany: pods on several machines; the storage class must offer it (NFS, CephFS, EFS ...).\n"
        "ReadWriteOnce: all pods on one machine, as in kind and minikube (local-path, hostpath).",
        "spec/resources/requests/storage": "A checkpoint takes 12 bytes a parameter, GPT-2 124M 1.5 GB; three are kept.",
    },
    "Role": {
        "": "What a master may do: make and replace the pods of its job in this namespace, and read how many are wanted.\n"
        "Workers talk to the master alone and have no rights at all.",
        "rules/{elasticjobs/finalizers}": "The pods' owner references block the owner's deletion; some clusters (OpenShift)\n"
        "ask for this right before they allow it.",
        "rules/{elasticjobs/status}": "DLRover's operator 0.6.1 takes a lost master for the job's end;\n"
        "the next master puts that right.",
    },
    "ConfigMap": {"": "The text that `prepare` reads."},
    "Job": {
        "": "Text to tokens, once: train.bin, val.bin and last of all meta.json.",
        "spec/template/spec/securityContext/fsGroup": "Makes the volume writable for the image's user.",
    },
    "ElasticJob": {
        "": "Comments say what DLRover 0.6.1 makes of a field where that is not what the field says.\n"
        "No label app.kubernetes.io/name here: the operator copies labels to the master, and would lose sight of it.",
        f"{_MASTER}/restartCount": "How many masters may be lost; the default is 0. One that exits with 1 fails the job\n"
        "anyhow. After a loss the phase may be Failed until the next master has put that right.",
        f"{_MASTER}/template/spec/containers/main/image": "Not the operator's default: master and agents are of one version.",
        f"{_MASTER}/template/spec/containers/main/args/elastic-gpt": "DLRover's master, which scales a running job as well.",
        f"{_WORKER}/replicas": "How many nodes are wanted now, from the least to the most of --nnodes:\n"
        "`elastic-gpt job scale`, `kubectl patch` and `kubectl edit` change it while the job runs.",
        f"{_WORKER}/restartCount": "How often a node may fail; the default is 3.",
        f"{_POD}/terminationGracePeriodSeconds": "What a preempted node has for saving its state. DLRover clears this\n"
        "field and Kubernetes then takes its default, 30: a larger number here would be an empty promise.",
        f"{_POD}/securityContext/fsGroupChangePolicy": "Else each new node walks through all checkpoints before it starts.",
        f"{_POD}/affinity": "Preferred, not required: without spot machines the job runs on others.",
        f"{_POD}/initContainers/wait-for-data": "Lets everything be applied at once; prepare writes meta.json last.",
        f"{_MAIN}/args/--nnodes=": "Fixed for the life of the job. With fewer nodes than the least, training waits.",
        f"{_MAIN}/args/--nproc=": "Workers on a node: one for each of its GPUs.",
        f"{_MAIN}/args/--network-check": "Finds a bad machine or link; repeated, by DLRover, at every change of members.",
        f"{_MAIN}/resources/requests": "DLRover makes the limits of cpu and memory equal to these.",
        f"{_MAIN}/resources/requests/memory": "Holds /dev/shm below, too.",
        f"{_POD}/volumes/snapshots": "Two snapshots of 12 bytes a parameter, and NCCL's buffers; else it has 64 MB.",
    },
    "distributed": {
        "": "For `ads opctl run -f`. What stands in <brackets> only your tenancy knows.",
        "spec/runtime/spec/args": "Preset and settings of `elastic-gpt train`. Data and run directory are\n"
        "one for all nodes, in object storage; no file system is shared.",
        "spec/cluster/spec/main/replicas": "Always 1; the main node keeps torchrun's store, and the job ends with it.",
    },
    "CreateCustomJobRequest": {
        "": "For examples/vertex/send.py. What stands in <brackets> only your project knows.",
        "customJob/jobSpec/workerPoolSpecs": "Data and run directory are one for all replicas, in\n"
        "Cloud Storage; no file system is shared.",
    },
    "UploadModelRequest": {
        "model/artifactUri": "What `elastic-gpt export` wrote: weights, configuration and tokenizer.",
        "model/containerSpec/args": "It takes port, routes and the model's place from Vertex AI's variables, AIP_...",
    },
    "DeployModelRequest": {
        "": "send.py puts in <endpoint> and <model> what the requests before it made.",
        "trafficSplit": "0 is the model that this request deploys.",
    },
    "JobSet": {
        "": "torchrun on each pod: no operator but JobSet's own controller.",
        "spec/network/publishNotReadyAddresses": "Workers look for pod 0, which keeps torchrun's store, as it starts.",
        "spec/replicatedJobs/node/template/spec/backoffLimit": "Pods that may fail and be replaced.",
    },
    "TrainingRuntime": {
        "": "How a step runs. Kubeflow's controller makes the pods, their names and torchrun's environment (PET_...).",
        "spec/mlPolicy/torch": "Has PET_NNODES, PET_NPROC_PER_NODE, PET_MASTER_ADDR and PET_MASTER_PORT set in `node`.",
        "spec/template/spec/replicatedJobs/node": "Replicated job and container have to be called `node`.",
        "spec/template/spec/replicatedJobs/node/template/spec/backoffLimit": "Pods that may fail and be replaced.",
    },
    "TrainJob": {
        "": "One run of it. A TrainJob does not change once it is there: for other numNodes, delete it and apply another;\n"
        "the run goes on from what is on the volume.",
    },
    "Deployment": {
        "": "The model over HTTP, and a page to talk to it; each newer checkpoint is taken over as the run writes it.\n"
        "To let only those in who have a token: kubectl -n NAMESPACE create secret generic NAME-serve --from-literal=token=...",
        "spec/template/spec/terminationGracePeriodSeconds": "What is being answered is answered to its end.",
        "spec/template/spec/containers/serve/startupProbe": "An hour, for the run to write its first checkpoint.",
        "spec/template/spec/containers/serve/lifecycle": "Meanwhile the Service learns that no more requests go here.",
    },
    "Pod": {
        "spec/containers/prompt/stdinOnce": "The pod ends when the person leaves.",
    },
}


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        return super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _text(dumper: yaml.SafeDumper, data: str) -> yaml.ScalarNode:
    style = "|" if "\n" in data else None
    if set(data) & set("\x85\u2028\u2029"):  # PyYAML takes these for line ends, and adds spaces after them
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)


def _list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.SequenceNode:
    """Short lists of words are on one line; command lines and objects have one element on each line."""
    words = all(isinstance(item, str) and item[:1] != "-" for item in data) and len(" ".join(data)) < 60
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=words)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)


def to_yaml(trees: list[Tree], heading: str = "") -> str:
    """All objects as one YAML stream with comments. `heading`: a comment at the top."""
    return (f"# {heading}\n" if heading else "") + "---\n".join(map(_document, trees))


def _document(tree: Tree) -> str:
    body = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)
    notes = NOTES.get(tree["kind"], {})
    lines = body.splitlines(keepends=True)
    for path, line, column in sorted(_places(yaml.compose(body, Loader=yaml.SafeLoader), ""), key=lambda p: -p[1]):
        for note in reversed(notes.get(path, "").splitlines()):
            lines.insert(line, f"{' ' * column}# {note}\n")
    return "".join(lines)


def _places(node: Any, path: str) -> Iterator[tuple[str, int, int]]:
    """Yields path, line and column of the document, of each key and of each list element."""
    if not path:
        yield "", 0, 0
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = f"{path}/{key.value}".lstrip("/")
            yield below, key.start_mark.line, key.start_mark.column
            yield from _places(value, below)
    elif isinstance(node, yaml.SequenceNode):
        for element in node.value:
            name = _name(element)
            yield f"{path}/{name}", element.start_mark.line, element.start_mark.column - 2
            yield from _places(element, f"{path}/{name}")


def _name(element: Any) -> str:
    """The name of a list element in a path: its name, its resources in braces, or a flag without its value."""
    if isinstance(element, yaml.ScalarNode):
        flag, equals, _ = str(element.value).partition("=")
        return flag + equals
    if isinstance(element, yaml.MappingNode):
        fields = {key.value: value for key, value in element.value}
        if "name" in fields:
            return str(fields["name"].value)
        if "resources" in fields:
            return "{" + ",".join(item.value for item in fields["resources"].value) + "}"
    return ""
