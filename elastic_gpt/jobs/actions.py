"""What can be done with a job. Each action ends with an exit code, says what it did, and can be repeated after a failure."""

import time
from collections.abc import Mapping
from typing import Any

from elastic_gpt.jobs import manifest
from elastic_gpt.jobs import status as state
from elastic_gpt.jobs.client import (
    INSTALL_DEFINITION,
    Cluster,
    ClusterError,
    ExistsError,
    ForbiddenError,
    NotFoundError,
)
from elastic_gpt.jobs.manifest import Tree
from elastic_gpt.jobs.polling import Told, fetch, late, looks, read, say, tails
from elastic_gpt.jobs.spec import JobSpec

# A suspended job's pods that are still there after this, with no master to remove them, are ours to remove.
ALONE_SECONDS = 15.0


def submit(cluster: Cluster, spec: JobSpec, *, dry_run: bool) -> int:
    """Make what is not there yet. `dry_run`: let the server check everything and keep nothing."""
    # First of all, because it tells whether the cluster knows ElasticJobs at all.
    job = cluster.find("ElasticJob", spec.name)
    done = " (dry run)" if dry_run else ""
    for tree in manifest.manifests(spec):
        kind, name = tree["kind"], tree["metadata"]["name"]
        try:
            cluster.create(tree, dry_run=dry_run)
            say(f"{kind.lower()}/{name} created{done}")
        except ExistsError:
            say(f"{kind.lower()}/{name} {_keep(cluster, tree, dry_run=dry_run)}{done}")
        except ForbiddenError:
            if kind != "Namespace":
                raise
            say(f"namespace/{name}: not allowed to create it, so it is taken to be there")
        except NotFoundError as error:
            if dry_run and cluster.find("Namespace", spec.namespace) is None:
                raise ClusterError(
                    f"the server cannot check what goes into namespace {spec.namespace} before it is there:"
                    f" `kubectl create namespace {spec.namespace}`, or --dry-run=client"
                ) from error
            raise
    if job is None and not dry_run:
        say(f"watch it: elastic-gpt job watch {spec.name} -n {spec.namespace}")
    return 0


def _keep(cluster: Cluster, tree: Tree, *, dry_run: bool) -> str:
    """What to do with an object that is there already. Raises ClusterError if it is another than was asked for."""
    kind, name = tree["kind"], tree["metadata"]["name"]
    if kind in ("Namespace", "PersistentVolumeClaim", "ServiceAccount"):
        return "unchanged"  # shared by jobs, and perhaps the cluster administrator's
    there = cluster.get(kind, name)
    wanted = {key: value for key, value in tree.items() if key in ("spec", "data", "rules", "roleRef", "subjects")}
    if kind == "ElasticJob":
        worker = wanted["spec"]["replicaSpecs"]["worker"]
        replicas = there["spec"]["replicaSpecs"]["worker"].get("replicas", 1)
        wanted["spec"]["replicaSpecs"]["worker"] = worker | {"replicas": replicas}  # `job scale` may have changed it
        phase = there.get("status", {}).get("phase", "")
        if phase in state.ENDED:
            raise ClusterError(
                f"job {name} is there and has ended ({phase}): `elastic-gpt job delete {name}` first; its checkpoints stay"
                " on the volume, and the same name goes on from them"
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
    """Whether everything in `wanted` is in `there`, which may have more: what the server filled in."""
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
    """Until the job has ended: 0 Succeeded, 1 Failed, 124 when the time is over."""
    tell = Told()
    for now in looks(cluster, name, timeout):
        tell([f"{name}: {now.headline()}", *now.troubles()])
        if now.ended:
            return 0 if now.phase == "Succeeded" else 1
    return late(name, timeout, " has not ended")


def scale(cluster: Cluster, name: str, nodes: int, *, timeout: float, wait: bool) -> int:
    """Ask for another number of nodes, and wait until that many train together."""
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
    say(f"{name}: asked for {state.count(nodes, 'node')}, {'as before' if before == nodes else f'{before} before'}")
    if job["spec"].get("suspend"):
        say(f"{name} is suspended: they come with `elastic-gpt job resume {name}`")
        return 0
    return until_world(cluster, name, timeout=timeout) if wait else 0


def until_world(cluster: Cluster, name: str, *, timeout: float) -> int:
    """Wait until as many nodes as are wanted train in one world; say what keeps them from it."""
    tell, each = Told(), workers(fetch(cluster, name))
    for now in looks(cluster, name, timeout):
        if now.ended:
            say(f"{name}: {now.headline()}")
            return 0 if now.phase == "Succeeded" else 1
        gone = [f"{node.name}: {node.phase}" for node in now.nodes if node.phase == "Leaving"]
        size = state.world(tails(cluster, now, lines=200)) if now.running == now.wanted else None
        if size and size[1] == now.wanted * each:
            say(f"{name}: trains on {state.count(now.running, 'node')} together, with {state.count(size[1], 'worker')}")
            return 0
        forming = ["the nodes run; their world is being formed"] if now.running == now.wanted else []
        tell([f"{now.running} of {now.wanted} nodes run", *now.troubles(), *gone, *forming])
    return late(name, timeout, " has not the nodes it was asked for")


def workers(job: Tree) -> int:
    """On each node of an ElasticJob."""
    for word in job["spec"]["replicaSpecs"]["worker"]["template"]["spec"]["containers"][0].get("args", []):
        if word.startswith("--nproc="):
            return int(word.partition("=")[2])
    return 1


def suspend(cluster: Cluster, name: str, *, timeout: float, wait: bool) -> int:
    """Let all nodes save their state and go; `resume` goes on from there."""
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
    for now in looks(cluster, name, timeout):
        left = [node for node in now.nodes if node.phase not in state.ENDED]
        if not left:
            say(f"{name}: no node is left; `elastic-gpt job resume {name}` goes on")
            return 0
        tell([f"{node.name}: {node.phase}" for node in left])
        if any(one.kind == "dlrover-master" and one.phase == "Running" for one in now.others):
            alone = time.monotonic()
        elif time.monotonic() - alone > ALONE_SECONDS:  # the operator stops no node, and there is no master to do it
            for node in left:
                if node.phase != "Leaving" and cluster.delete("Pod", node.name):
                    say(f"{node.name}: deleted, for no master runs that would")
    return late(name, timeout, " still has nodes")


def resume(cluster: Cluster, name: str, *, timeout: float, wait: bool) -> int:
    """Start a suspended job's nodes again."""
    if read(cluster, name).ended:
        raise ClusterError(f"{name} has ended: nothing is left to resume")
    cluster.patch("ElasticJob", name, {"spec": {"suspend": False}})
    say(f"{name}: resumed")
    return until_world(cluster, name, timeout=timeout) if wait else 0


def delete(cluster: Cluster, name: str, *, volume: bool) -> int:
    """Delete the job and what was made for it; the volume with the model only if asked to."""
    job = cluster.find("ElasticJob", name)
    claim = claim_of(job) if job else ""
    if volume:
        if not job:
            raise ClusterError(f"no job '{name}' tells which volume was its: kubectl -n {cluster.namespace} get pvc")
        others = [one["metadata"]["name"] for one in cluster.select("ElasticJob")
                  if one["metadata"]["name"] != name and claim_of(one) == claim]  # fmt: skip
        if others:
            raise ClusterError(f"volume {claim} is used by {', '.join(others)} as well: delete them first")
    made = [("ElasticJob", name), ("Job", f"{name}-prepare"), ("ConfigMap", f"{name}-text")]
    made += [("Pod", f"{name}-prompt"), ("Pod", f"{name}-shell")] + [("PersistentVolumeClaim", claim)] * volume
    gone = [f"{kind.lower()}/{one}" for kind, one in made if cluster.delete(kind, one)]
    if not gone:
        fetch(cluster, name)
    for one in gone:
        say(f"{one} deleted")
    if claim and not volume:
        say(f"volume {claim} stays, and on it the run in /workspace/{name}")
    return 0


def claim_of(job: Tree) -> str:
    """The PersistentVolumeClaim of an ElasticJob's workers; empty if they have none."""
    volumes = job["spec"]["replicaSpecs"]["worker"]["template"]["spec"].get("volumes", [])
    return next(
        (str(one["persistentVolumeClaim"]["claimName"]) for one in volumes if "persistentVolumeClaim" in one), ""
    )
