"""Objects that use a job's model. They are made from its ElasticJob, with the same image, volume and run."""

from collections.abc import Callable

from elastic_gpt.jobs.actions import job_claim
from elastic_gpt.jobs.client import ClusterError
from elastic_gpt.jobs.manifest import Tree
from elastic_gpt.jobs.spec import JobSpec


def using(job: Tree, make: Callable[[JobSpec], list[Tree]]) -> list[Tree]:
    """The objects that `make` makes for an ElasticJob. Raises ClusterError if it does not train one of our models."""
    pod = job["spec"]["replicaSpecs"]["worker"]["template"]["spec"]
    main = pod["containers"][0]
    words = main.get("args", [])
    if "train" not in words:
        raise ClusterError(f"{job['metadata']['name']} does not run `elastic-gpt train`: there is no model to talk to")
    preset, *arguments = words[words.index("train") + 1 :]
    spec = JobSpec(  # run directory and data are among the arguments
        name=job["metadata"]["name"],
        namespace=job["metadata"]["namespace"],
        image=main["image"],
        preset=preset,
        arguments=tuple(arguments),
        volume=job_claim(job) or JobSpec.volume,
        env_secret=next((one["secretRef"]["name"] for one in main.get("envFrom", []) if "secretRef" in one), ""),
        pull_secret=next((one["name"] for one in pod.get("imagePullSecrets", [])), ""),
    )
    return make(spec)
