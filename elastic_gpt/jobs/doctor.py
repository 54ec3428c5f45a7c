"""Finds what a cluster lacks for a job, and the command that helps."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from elastic_gpt.jobs import manifest, polling, status
from elastic_gpt.jobs.client import INSTALL_DEFINITION, INSTALL_OPERATOR, Cluster, ClusterError, UnknownKindError
from elastic_gpt.jobs.manifest import Tree
from elastic_gpt.jobs.operator import NAME as OPERATOR
from elastic_gpt.jobs.operator import operators
from elastic_gpt.jobs.pods import pod_trouble

# For a cluster without storage: storage on a single machine, as in kind. For GPUs: NVIDIA's device plugin.
INSTALL_STORAGE = "kubectl apply -f https://raw.githubusercontent.com/rancher/local-path-provisioner/v0.0.31/deploy/local-path-storage.yaml"
INSTALL_GPUS = (
    "kubectl apply -f https://raw.githubusercontent.com/NVIDIA/k8s-device-plugin/v0.17.0/deployments/static/"
    "nvidia-device-plugin.yml"
)

# Parts of a provisioner's name that tell which access modes it offers.
MANY = (
    *("nfs", "cephfs", "efs", "filestore", "azurefile", "file.csi.azure", "lustre", "longhorn", "juicefs", "gluster"),
    *("beegfs", "portworx", "weka", "gpfs", "spectrumscale", "trident", "quobyte"),
)
ONE = (
    *("ebs", "disk.csi", "azure-disk", "gce-pd", "pd.csi", "local-path", "hostpath", "rbd", "cinder", "diskplugin"),
    *("no-provisioner", "vsphere-volume", "topolvm", "openebs.io/local"),
)

# The rights that the commands need: verb, kind, subresource, and which commands need it.
RIGHTS = (
    ("list", "ElasticJob", "", "list, status, watch"),
    ("get", "ElasticJob", "", "every command"),
    ("create", "ElasticJob", "", "submit"),
    ("patch", "ElasticJob", "", "scale, suspend, resume"),
    ("delete", "ElasticJob", "", "delete"),
    ("list", "Pod", "", "status, watch, wait"),
    ("get", "Pod", "", "prompt, logs"),
    ("get", "Pod", "log", "logs, and step and loss in watch"),
    ("create", "Pod", "", "prompt"),
    ("create", "Pod", "attach", "prompt"),
    ("delete", "Pod", "", "prompt, suspend, delete"),
    ("list", "Event", "", "watch"),
    *((verb, "Job", "", use) for verb, use in (("get", "submit"), ("create", "submit"), ("delete", "delete"))),
    ("create", "PersistentVolumeClaim", "", "submit"),
    ("delete", "PersistentVolumeClaim", "", "delete --volume"),
    *((verb, "ConfigMap", "", "submit --text") for verb in ("get", "create", "patch")),
    ("delete", "ConfigMap", "", "delete"),
    ("create", "ServiceAccount", "", "submit"),
    *((verb, kind, "", "submit") for kind in ("Role", "RoleBinding") for verb in ("get", "create")),
    ("patch", "Role", "", "submit"),
    *((verb, kind, "", "serve") for kind in ("Deployment", "Service") for verb in ("create", "patch")),
    ("get", "Deployment", "", "serve"),
    *(("delete", kind, "", "delete") for kind in ("Deployment", "Service")),
)


@dataclass(frozen=True)
class Finding:
    what: str
    well: bool | None
    """Whether it is as it should be; None if that cannot be found out."""
    found: str
    cure: str = ""

    def __str__(self) -> str:
        mark = {True: "ok", False: "MISSING", None: "unknown"}[self.well]
        return f"{mark:<8} {self.what}: {self.found}" + (
            f"\n         {self.cure}" if self.cure and not self.well else ""
        )


def doctor(cluster: Cluster, *, volume: str) -> int:
    """Print what the cluster has and lacks. Returns exit code 1 if something is missing."""
    findings = [Finding("server", True, f"{cluster.server}, Kubernetes {cluster.version()}")]
    polling.say(str(findings[0]))
    for check in (_definition, _operator, _namespace, _rights, _volume, _gpus, _images, _masters):
        try:
            found = list(check(cluster, volume))
        except ClusterError as error:
            found = [Finding(check.__name__.strip("_"), None, str(error).partition(";")[0])]
        for one in found:
            polling.say(str(one))
        findings += found
    return int(any(one.well is False for one in findings))


def _definition(cluster: Cluster, _: str) -> Iterator[Finding]:
    try:
        jobs = cluster.select("ElasticJob")
    except UnknownKindError:
        yield Finding("ElasticJob", False, "this cluster does not know the kind", INSTALL_OPERATOR)
        return
    yield Finding("ElasticJob", True, f"known; {len(jobs)} in namespace {cluster.namespace}")
    definition = cluster.get("CustomResourceDefinition", "elasticjobs.elastic.iml.github.io")
    fields = [version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
              for version in definition["spec"]["versions"] if version["name"] == "v1alpha1"]  # fmt: skip
    if not any("suspend" in one for one in fields):
        yield Finding("suspend", False, "the definition of ElasticJobs is an old one without it", INSTALL_DEFINITION)


def _operator(cluster: Cluster, _: str) -> Iterator[Finding]:
    found = operators(cluster)
    if not found:
        yield Finding("operator", False, f"no deployment {OPERATOR} in any namespace", INSTALL_OPERATOR)
    for one in found:
        here = f"{OPERATOR} runs in namespace {one.namespace}"
        yield Finding("operator", not one.trouble, one.trouble or here, one.cure)
    if len(found) > 1:
        yield Finding("operator", False, "there are several, and each makes masters", "delete all but one")


def _masters(cluster: Cluster, _: str) -> Iterator[Finding]:
    """Jobs that should have a master but have none."""
    for job in cluster.select("ElasticJob"):
        name = job["metadata"]["name"]
        state = polling.read(cluster, name, job)
        if state.phase != "New" and state.masterless_since and state.reason:  # the checks above judge New ones
            yield Finding(f"job {name}", False, f"{state.phase}: {state.reason}")


def _namespace(cluster: Cluster, _: str) -> Iterator[Finding]:
    name = cluster.namespace
    there = cluster.find("Namespace", name)
    if there is None:
        yield Finding(
            "namespace", False, f"{name} is not there", f"kubectl create namespace {name}, or let submit make it"
        )
        return
    yield Finding("namespace", True, name)
    account = cluster.find("ServiceAccount", manifest.MASTER)
    yield (
        Finding("master's account", True, f"serviceaccount/{manifest.MASTER}")
        if account
        else Finding("master's account", None, f"no serviceaccount {manifest.MASTER} yet; submit makes it")
    )


def _rights(cluster: Cluster, _: str) -> Iterator[Finding]:
    lacking = [one for one in RIGHTS if not cluster.allowed(one[0], one[1], subresource=one[2])]
    if not lacking:
        yield Finding("your rights", True, f"all that the commands need in namespace {cluster.namespace}")
        return
    told = [f"{verb} {kind.lower()}s{f'/{sub}' if sub else ''} (for {use})" for verb, kind, sub, use in lacking]
    bind = f"kubectl -n {cluster.namespace} create rolebinding"
    cures = []
    if any(kind == "ElasticJob" for _, kind, _, _ in lacking):
        verbs = "get,list,watch,create,patch,delete"
        cures = [f"kubectl create clusterrole elasticjob-user --verb={verbs} --resource=elasticjobs.{manifest.GROUP}",
                 f"{bind} elasticjob-user --clusterrole=elasticjob-user --user=YOU"]  # fmt: skip
    if any(kind != "ElasticJob" for _, kind, _, _ in lacking):
        cures.append(f"{bind} elastic-gpt-user --clusterrole=admin --user=YOU")
    yield Finding(
        "your rights", False, f"in namespace {cluster.namespace} you may not {'; '.join(told)}",
        "an administrator: " + " && ".join(cures),
    )  # fmt: skip


def _volume(cluster: Cluster, volume: str) -> Iterator[Finding]:
    if not volume:
        yield Finding("volume", True, "none is needed where data and run directory are URLs")
        return
    claim = cluster.find("PersistentVolumeClaim", volume)
    classes = {one["metadata"]["name"]: one for one in cluster.select("StorageClass")}
    if claim:
        phase = claim.get("status", {}).get("phase", "Pending")
        modes = ", ".join(claim["spec"]["accessModes"])
        kind = classes.get(claim["spec"].get("storageClassName", ""), {})
        late = kind.get("volumeBindingMode") == "WaitForFirstConsumer"
        events = status.job_events(volume, volume, cluster.select("Event"))
        told = next((one.message for one in reversed(events) if one.warning and one.about == volume), "")
        yield Finding(
            "volume", True if phase == "Bound" else None if late and not told else False,
            f"{volume} is {phase} ({modes})" + (": bound when the first pod comes" if late and phase == "Pending" else "")
            + (f": {told}" if told and phase != "Bound" else ""),
            f"kubectl -n {cluster.namespace} describe pvc {volume}; another class or mode: delete the claim, then submit with"
            " --storage-class or --access-mode ReadWriteOnce (one machine)",
        )  # fmt: skip
        return
    default = [name for name, one in classes.items() if is_default(one)]
    many = [name for name, one in classes.items() if offers_many(one["provisioner"])]
    unclear = [name for name, one in classes.items() if offers_many(one["provisioner"]) is None]
    listed = ", ".join(f"{name} ({one['provisioner']})" for name, one in classes.items()) or "none"
    if not classes:
        yield Finding("storage", False, "no storage class", INSTALL_STORAGE)
        return
    yield Finding(
        "storage", True if default else None, f"classes: {listed}; default: {', '.join(default) or 'none'}",
        "name one: --storage-class",
    )  # fmt: skip
    fits = set(default) & set(many)
    yield Finding(
        "ReadWriteMany",
        True if fits else None if many or set(default) & set(unclear) else False,
        f"the default offers it, by its name: {', '.join(fits)}" if fits
        else f"by their names, these offer it: {', '.join(many)}" if many
        else f"cannot be told of {', '.join(unclear)}" if unclear else "no class offers it, by their names",
        f"--storage-class {many[0]}" if many else "nodes on several machines need it (NFS, CephFS, EFS, Filestore ...);"
        " on a single machine: --access-mode ReadWriteOnce",
    )  # fmt: skip


def is_default(storage_class: Tree) -> bool:
    annotations = storage_class["metadata"].get("annotations", {})
    return bool(annotations.get("storageclass.kubernetes.io/is-default-class") == "true")


def offers_many(provisioner: str) -> bool | None:
    """Whether a provisioner offers ReadWriteMany; None if its name does not tell."""
    name = provisioner.lower()
    if any(word in name for word in MANY):
        return True
    return False if any(word in name for word in ONE) else None


def _gpus(cluster: Cluster, _: str) -> Iterator[Finding]:
    machines = {one["metadata"]["name"]: allocatable_gpus(one) for one in cluster.select("Node")}
    found = ", ".join(f"{name} {count}" for name, count in machines.items() if count)
    yield (
        Finding("GPUs", True, f"{sum(machines.values())} on {len(machines)} machines: {found}")
        if found
        else Finding(
            "GPUs", False, f"none of {len(machines)} machines offers nvidia.com/gpu",
            f"{INSTALL_GPUS}; to train on CPUs: submit --gpus 0",
        )
    )  # fmt: skip


def allocatable_gpus(machine: Tree) -> int:
    if machine["spec"].get("unschedulable"):
        return 0
    return int(machine.get("status", {}).get("allocatable", {}).get("nvidia.com/gpu", 0))


def _images(cluster: Cluster, _: str) -> Iterator[Finding]:
    """Images that earlier pods could not pull. Whether an image can be pulled shows only when a pod tries."""
    try:
        jobs = cluster.select("ElasticJob")
    except UnknownKindError:
        jobs = []
    pods = cluster.select("Pod")
    for image, secrets in sorted(images(jobs).items()):
        missing = [name for name in secrets if cluster.find("Secret", name) is None]
        troubles = {trouble for pod in pods if image in _images_of(pod) and "Pull" in (trouble := pod_trouble(pod))}
        ran = [pod["spec"].get("nodeName", "?") for pod in pods if image in _images_of(pod) and _started(pod)]
        if missing:
            cure = f"kubectl -n {cluster.namespace} create secret docker-registry {missing[0]} --docker-server=... ..."
            yield Finding("image", False, f"{image}: no secret {missing[0]}", cure)
        elif troubles:
            cure = "push it, mend its name (--image), or give --pull-secret; on kind: kind load docker-image"
            yield Finding("image", False, f"{image}: {'; '.join(sorted(troubles))}", cure)
        elif ran:
            yield Finding("image", True, f"{image}: was pulled on {', '.join(sorted(set(ran)))}")
        else:
            yield Finding("image", None, f"{image}: no pod has tried to pull it yet")
    if not jobs:
        yield Finding("image", None, "whether one can be pulled shows when the first pod does")


def images(jobs: Iterable[Tree]) -> dict[str, set[str]]:
    """The images of ElasticJobs, each with the names of its pull secrets."""
    found: dict[str, set[str]] = {}
    specs = (replica["template"]["spec"] for job in jobs for replica in job["spec"]["replicaSpecs"].values())
    for spec in specs:
        for container in spec["containers"]:
            found.setdefault(container["image"], set()).update(one["name"] for one in spec.get("imagePullSecrets", []))
    return found


def _images_of(pod: Tree) -> list[str]:
    return [one["image"] for one in itertools.chain(pod["spec"]["containers"], pod["spec"].get("initContainers", []))]


def _started(pod: Tree) -> bool:
    statuses = [*(pod["status"].get("initContainerStatuses") or []), *(pod["status"].get("containerStatuses") or [])]
    return any(one.get("imageID") for one in statuses)
