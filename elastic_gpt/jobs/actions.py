"""Actions on a job. Each one prints what it did, returns an exit code, and can be repeated after a failure."""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from elastic_gpt.jobs import manifest, polling, status
from elastic_gpt.jobs.causes import same_name_elsewhere
from elastic_gpt.jobs.client import (
    INSTALL_DEFINITION,
    Cluster,
    ClusterError,
    ExistsError,
    ForbiddenError,
    NotFoundError,
)
from elastic_gpt.jobs.manifest import Tree
from elastic_gpt.jobs.pods import ENDED, JOB_NAME
from elastic_gpt.jobs.polling import Told, fetch, late, poll, read, say
from elastic_gpt.jobs.spec import JobSpec
from elastic_gpt.jobs.words import count

# If a suspended job's pods are still there after so long and no master runs to remove them, the client removes them.
ALONE_SECONDS = 15.0


def submit(cluster: Cluster, spec: JobSpec, *, dry_run: bool, timeout: float = 120) -> int:
    """Make all objects that do not exist yet. `dry_run`: the server checks everything and keeps nothing."""
    # First, since it shows whether the cluster knows ElasticJobs at all.
    job = cluster.find("ElasticJob", spec.name)
    _alone_of_its_name(cluster, spec)
    if not dry_run and (job is None or "deletionTimestamp" in job["metadata"]):
        job = None
        if not until_gone(cluster, spec.name, timeout=timeout):
            return late(spec.name, timeout, " was deleted before and is not gone")
    make(cluster, manifest.manifests(spec), spec.namespace, dry_run=dry_run, keep=_keep)
    if job is None and not dry_run:
        say(f"watch it: elastic-gpt job watch {spec.name} -n {spec.namespace}")
    return 0


def make(cluster: Cluster, trees: Iterable[Tree], namespace: str, *, dry_run: bool, keep: Callable[..., str]) -> None:
    """Make objects and print what was done.

    `keep(cluster, tree, dry_run=...)` is called for an object that exists already, and returns what
    it did in one word.
    """
    done = " (dry run)" if dry_run else ""
    for tree in trees:
        kind, name = tree["kind"], tree["metadata"]["name"]
        try:
            cluster.create(tree, dry_run=dry_run)
            say(f"{kind.lower()}/{name} created{done}")
        except ExistsError:
            say(f"{kind.lower()}/{name} {keep(cluster, tree, dry_run=dry_run)}{done}")
        except ForbiddenError:
            if kind != "Namespace":
                raise
            say(f"namespace/{name}: not allowed to create it, so it is taken to be there")
        except NotFoundError as error:
            if dry_run and cluster.find("Namespace", namespace) is None:
                raise ClusterError(
                    f"the server cannot check what goes into namespace {namespace} before it is there:"
                    f" `kubectl create namespace {namespace}`, or --dry-run=client"
                ) from error
            raise


def _alone_of_its_name(cluster: Cluster, spec: JobSpec) -> None:
    """Raises ClusterError if another namespace has a job of this name: DLRover's operator would give it no pods."""
    try:
        others = same_name_elsewhere(cluster, spec.name, spec.namespace)
    except ForbiddenError:
        say(
            "note: you may not look into other namespaces; a job of the same name in one of them would get this one no pods"
        )
        return
    if others:
        raise ClusterError(
            f"namespace {others[0]} has a job {spec.name}, and DLRover's operator tells jobs apart by their names alone: take"
            " another name"
        )


def until_gone(cluster: Cluster, name: str, *, timeout: float) -> bool:
    """Wait until nothing is left of a deleted job, whose master the operator would take for that of a new job.

    Returns False if the time is over.
    """
    end, tell = time.monotonic() + timeout, Told()
    while True:
        job = cluster.find("ElasticJob", name)
        left = [f"elasticjob/{name}"] if job and "deletionTimestamp" in job["metadata"] else []
        if job and not left:
            return True  # somebody has made a new job
        with contextlib.suppress(ForbiddenError):
            left += [f"pod/{one['metadata']['name']}" for one in cluster.select("Pod", labels=f"{JOB_NAME}={name}")]
        if not left:
            return True
        tell([f"{name}: waiting until {', '.join(left)} {'are' if len(left) > 1 else 'is'} gone"])
        if time.monotonic() >= end:
            return False
        time.sleep(polling.POLL_SECONDS)


def _keep(cluster: Cluster, tree: Tree, *, dry_run: bool) -> str:
    """Handle an object that exists already. Raises ClusterError if it differs from what was asked for."""
    kind, name = tree["kind"], tree["metadata"]["name"]
    if kind in ("Namespace", "PersistentVolumeClaim", "ServiceAccount"):
        return "unchanged"  # shared by jobs, and perhaps the cluster administrator's
    there = cluster.get(kind, name)
    wanted = {key: value for key, value in tree.items() if key in ("spec", "data", "rules", "roleRef", "subjects")}
    if kind == "ElasticJob":
        worker = wanted["spec"]["replicaSpecs"]["worker"]
        replicas = there["spec"]["replicaSpecs"]["worker"].get("replicas", 1)
        wanted["spec"]["replicaSpecs"]["worker"] = worker | {"replicas": replicas}  # `job scale` may have changed it
        try:
            now = read(cluster, name, there)
        except ForbiddenError:  # this user may not read pods
            now = status.job_state(there, [])
        if now.ended:
            raise ClusterError(
                f"job {name} is there and has ended ({now.phase}): `elastic-gpt job delete {name}` first; its checkpoints stay,"
                " and the same name goes on from them"
            )
    if covers(there, wanted):
        return "unchanged"
    if kind in ("Role", "ConfigMap"):
        if not dry_run:
            cluster.patch(kind, name, wanted)
        return "configured"
    raise ClusterError(
        f"{kind} {name} is there with other settings: `elastic-gpt job delete {name.removesuffix('-prepare')}` first (the"
        " volume stays), or take another name"
    )


def covers(there: Any, wanted: Any) -> bool:
    """Whether `there` has everything in `wanted`. It may have more, which the server has filled in."""
    if isinstance(wanted, Mapping):
        return isinstance(there, Mapping) and all(
            covers(there.get(key), value) for key, value in wanted.items() if value not in ({}, [])
        )
    if isinstance(wanted, list):
        return (
            isinstance(there, list) and len(there) == len(wanted) and all(map(covers, there, wanted))
        )  # fmt: skip
    return bool(there == wanted)


def wait(cluster: Cluster, name: str, *, timeout: float | None) -> int:
    """Wait until the job has ended. Returns 0 if it Succeeded, 1 if it Failed, 124 if the time is over."""
    tell = Told()
    for now in poll(cluster, name, timeout):
        tell([f"{name}: {now.headline()}", *now.troubles()])
        if now.ended:
            return 0 if now.phase == "Succeeded" else 1
    return late(name, timeout, " has not ended")


def scale(cluster: Cluster, name: str, nodes: int, *, timeout: float, wait: bool) -> int:
    """Ask for `nodes` nodes, and wait until that many train together."""
    job = fetch(cluster, name)
    now = read(cluster, name, job)
    if not now.least <= nodes <= now.most:
        raise ClusterError(
            f"--nodes {nodes}: {name} was started for {now.least} to {now.most} nodes; another range needs a new job"
        )
    if now.ended:
        raise ClusterError(f"{name} has ended ({now.phase}): nothing is left to scale")
    before = int(job["spec"]["replicaSpecs"]["worker"].get("replicas", 1))
    if before != nodes:
        cluster.patch("ElasticJob", name, {"spec": {"replicaSpecs": {"worker": {"replicas": nodes}}}})
    say(f"{name}: asked for {count(nodes, 'node')}, {'as before' if before == nodes else f'{before} before'}")
    if job["spec"].get("suspend"):
        say(f"{name} is suspended: they come with `elastic-gpt job resume {name}`")
        return 0
    return until_world(cluster, name, timeout=timeout) if wait else 0


def until_world(cluster: Cluster, name: str, *, timeout: float) -> int:
    """Wait until the wanted number of nodes trains in one world. Prints what keeps them from it."""
    tell, each = Told(), workers(fetch(cluster, name))
    for now in poll(cluster, name, timeout):
        if now.ended:
            say(f"{name}: {now.headline()}")
            return 0 if now.phase == "Succeeded" else 1
        gone = [f"{node.name}: {node.phase}" for node in now.nodes if node.phase == "Leaving"]
        world = polling.progress(cluster, now) if now.running == now.wanted else None
        if world and world.workers == now.wanted * each:
            say(f"{name}: trains on {count(now.running, 'node')} together, with {count(world.workers, 'worker')}")
            return 0
        forming = ["the nodes run; their world is being formed"] if now.running == now.wanted else []
        why = [f"{name}: {now.phase}: {now.reason}"] if now.reason else []
        tell([f"{now.running} of {now.wanted} nodes run", *why, *now.troubles(), *gone, *forming])
    return late(name, timeout, " has not the nodes it was asked for")


def workers(job: Tree) -> int:
    """Number of workers on each node of an ElasticJob."""
    for word in job["spec"]["replicaSpecs"]["worker"]["template"]["spec"]["containers"][0].get("args", []):
        if word.startswith("--nproc="):
            return int(word.partition("=")[2])
    return 1


def suspend(cluster: Cluster, name: str, *, timeout: float, wait: bool) -> int:
    """Stop all nodes after they have saved their state. `resume` goes on from there."""
    now = read(cluster, name)
    if now.ended:
        raise ClusterError(f"{name} has ended ({now.phase}): nothing is left to suspend")
    if "suspend" not in cluster.patch("ElasticJob", name, {"spec": {"suspend": True}})["spec"]:
        raise ClusterError(
            f"this cluster's definition of ElasticJobs is an old one without `suspend`; the newer: {INSTALL_DEFINITION}"
        )
    say(f"{name}: suspended; its nodes finish the step in flight, save their state and go")
    if not wait:
        return 0
    tell, alone = Told(), time.monotonic()
    for now in poll(cluster, name, timeout):
        if now.ended:
            say(f"{name}: {now.headline()}: there was nothing left to suspend")
            return 0 if now.phase == "Succeeded" else 1
        left = [node for node in now.nodes if node.phase not in ENDED]
        if not left:
            say(f"{name}: no node is left; `elastic-gpt job resume {name}` goes on")
            return 0
        tell([f"{node.name}: {node.phase}" for node in left])
        if any(one.kind == "dlrover-master" and one.phase == "Running" for one in now.others):
            alone = time.monotonic()
        elif time.monotonic() - alone > ALONE_SECONDS:  # no master runs that would stop them, and the operator does not
            for node in left:
                if node.phase != "Leaving" and cluster.delete("Pod", node.name):
                    say(f"{node.name}: deleted, for no master runs that would")
    return late(name, timeout, " still has nodes")


def resume(cluster: Cluster, name: str, *, timeout: float, wait: bool) -> int:
    """Start the nodes of a suspended job again."""
    if read(cluster, name).ended:
        raise ClusterError(f"{name} has ended: nothing is left to resume")
    cluster.patch("ElasticJob", name, {"spec": {"suspend": False}})
    say(f"{name}: resumed")
    return until_world(cluster, name, timeout=timeout) if wait else 0


def delete(cluster: Cluster, name: str, *, volume: bool, timeout: float, wait: bool) -> int:
    """Delete the job and what was made for it, and wait until it has gone. `volume`: delete the model as well."""
    job = cluster.find("ElasticJob", name)
    claim = job_claim(job) if job else ""
    if volume:
        if not job:
            raise ClusterError(f"no job '{name}' tells which volume was its: kubectl -n {cluster.namespace} get pvc")
        if not claim:
            raise ClusterError(f"job {name} has no volume: leave --volume out; its run stays on the object store")
        others = [one["metadata"]["name"] for one in cluster.select("ElasticJob")
                  if one["metadata"]["name"] != name and job_claim(one) == claim]  # fmt: skip
        if others:
            raise ClusterError(f"volume {claim} is used by {', '.join(others)} as well: delete them first")
    made = [("ElasticJob", name), ("Job", f"{name}-prepare"), ("ConfigMap", f"{name}-text")]
    made += [("Pod", f"{name}-prompt"), ("Pod", f"{name}-shell")]
    made += [("Deployment", f"{name}-serve"), ("Service", f"{name}-serve")]
    made += [("PersistentVolumeClaim", claim)] * volume
    gone = [f"{kind.lower()}/{one}" for kind, one in made if cluster.delete(kind, one)]
    if not gone:
        fetch(cluster, name)
    for one in gone:
        say(f"{one} deleted")
    if claim and not volume:
        say(f"volume {claim} stays, and on it the run in /workspace/{name}")
    if wait and not until_gone(cluster, name, timeout=timeout):
        return late(name, timeout, " is deleted, but pods of it are there still")
    return 0


def job_claim(job: Tree) -> str:
    """Name of the PersistentVolumeClaim of an ElasticJob's workers; "" if they have none."""
    return pod_claim(job["spec"]["replicaSpecs"]["worker"]["template"]["spec"])


def pod_claim(pod: Tree) -> str:
    """Name of the first PersistentVolumeClaim in the specification of a pod; "" if there is none."""
    volumes = pod.get("volumes", [])
    return next(
        (str(one["persistentVolumeClaim"]["claimName"]) for one in volumes if "persistentVolumeClaim" in one), ""
    )
