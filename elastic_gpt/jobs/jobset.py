"""JobSpec -> a JobSet of Kubernetes, without DLRover or Kubeflow: torchrun in the pods of one Indexed Job."""

from collections.abc import Callable

from elastic_gpt.jobs import manifest
from elastic_gpt.jobs.manifest import Tree
from elastic_gpt.jobs.spec import WORKSPACE, JobSpec
from elastic_gpt.jobs.trainjob import MOUNT, NODE, remounted, train_gpt

PORT = 29500


def jobset(spec: JobSpec) -> list[Tree]:
    """The JobSet with the pods of trainjob.py, and the values that Kubeflow's controller would fill in."""
    runtime, run = train_gpt(spec)
    [replicated] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    known = {
        "$(PET_NNODES)": str(spec.nodes),
        # Pods are called JOBSET-REPLICATEDJOB-REPLICA-INDEX, in a subdomain with the name of the JobSet.
        "$(PET_MASTER_ADDR)": f"{spec.name}-{NODE}-0-0.{spec.name}",
        "$(PET_MASTER_PORT)": str(PORT),
    }
    words = container.pop("command")[2:] + run["spec"]["trainer"]["args"]  # the image's entrypoint is tini
    for name, value in known.items():
        words = [word.replace(name, value) for word in words]
    words.insert(1, f"--nproc-per-node={spec.workers}")
    container["args"] = words
    replicated["replicas"] = 1
    replicated["template"] = {
        "spec": {"parallelism": spec.nodes, "completions": spec.nodes, "completionMode": "Indexed", **job}
    }
    tree = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": spec.name, "namespace": spec.namespace, "labels": {manifest.JOB_LABEL: spec.name}},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [replicated],
        },
    }
    return [remounted(tree, MOUNT, str(WORKSPACE))]


PARTS: dict[str, Callable[[JobSpec], list[Tree]]] = {
    **{part: manifest.PARTS[part] for part in ("namespace", "volume", "text", "prepare")},
    "job": jobset,
    "prompt": manifest.prompt,
}
JOB_PARTS = ("namespace", "volume", "text", "prepare", "job")
