"""JobSpec -> manifests: plain dicts from pure functions, without a cluster."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from elastic_gpt.jobs.spec import UPLOADED, WORKSPACE, JobSpec

Tree = dict[str, Any]

MASTER = "elastic-gpt-master"  # the service account of all masters in a namespace
JOB_LABEL = "elastic-gpt.io/job"
SERVE_LABEL = (
    "elastic-gpt.io/serves"  # label of server pods, which do not belong to the job; its value is the job's name
)
SERVE_PORT = 8080
LEAVE_SECONDS = 5
DRAIN_SECONDS = 330  # an answer takes at most 300 s (the server's --max-seconds), and the preStop hook a little
USER = 10001  # user id of the image
GROUP = "elastic.iml.github.io"
MASTER_NEEDS = {"cpu": "1", "memory": "2Gi"}

MASTER_RULES: list[Tree] = [
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch", "create", "delete"]},
    {"apiGroups": [""], "resources": ["services"], "verbs": ["get", "create", "patch"]},
    {"apiGroups": [GROUP], "resources": ["elasticjobs"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": [GROUP], "resources": ["elasticjobs/finalizers"], "verbs": ["update"]},
    {"apiGroups": [GROUP], "resources": ["elasticjobs/status"], "verbs": ["patch"]},
]

# Taints and labels of spot machines: GKE, AKS, EKS and Karpenter.
SPOT_TAINTS = [
    {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"},
    {"key": "kubernetes.azure.com/scalesetpriority", "operator": "Equal", "value": "spot", "effect": "NoSchedule"},
]
SPOT_LABELS = {
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
}
GPU_TAINT = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


def namespace(spec: JobSpec) -> list[Tree]:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": spec.namespace, "labels": labels}}]


def volume(spec: JobSpec) -> list[Tree]:
    """The claim, if anything of the job lies on it."""
    if not spec.needs_volume:
        return []
    claim: Tree = {"accessModes": [spec.access_mode], "resources": {"requests": {"storage": spec.volume_size}}}
    if spec.storage_class:
        claim["storageClassName"] = spec.storage_class
    return [_object("v1", "PersistentVolumeClaim", spec, spec.volume, {"spec": claim}, labels={})]


def rbac(spec: JobSpec) -> list[Tree]:
    """The rights of a master in its namespace. Workers have none."""
    group = "rbac.authorization.k8s.io"
    binding = {
        "roleRef": {"apiGroup": group, "kind": "Role", "name": MASTER},
        "subjects": [{"kind": "ServiceAccount", "name": MASTER, "namespace": spec.namespace}],
    }
    return [
        _object("v1", "ServiceAccount", spec, MASTER, {}, labels={}),
        _object(f"{group}/v1", "Role", spec, MASTER, {"rules": MASTER_RULES}, labels={}),
        _object(f"{group}/v1", "RoleBinding", spec, MASTER, binding, labels={}),
    ]


def text(spec: JobSpec) -> list[Tree]:
    """A ConfigMap with text files that are sent with the job, if there are any."""
    return [_object("v1", "ConfigMap", spec, f"{spec.name}-text", {"data": dict(spec.upload)})] if spec.upload else []


def prepare(spec: JobSpec) -> list[Tree]:
    """Text to tokens, once. None for a job whose data are there."""
    if not spec.prepares:
        return []
    texts = [*spec.texts, *(str(UPLOADED / name) for name, _ in spec.upload)] or ["--sample"]
    args = ["elastic-gpt", "prepare", *texts, f"--output-dir={spec.data_dir}", f"--tokenizer={spec.tokenizer}"]
    args += [f"--vocab-size={spec.vocab_size}"] if spec.vocab_size else []
    container = _container(spec, "prepare", args, cpu="2", memory="2Gi", mounts=_workspace_mounts(spec))
    volumes = _workspace(spec)
    if spec.upload:
        container["volumeMounts"].append({**_mount("text", str(UPLOADED)), "readOnly": True})
        volumes.append({"name": "text", "configMap": {"name": f"{spec.name}-text"}})
    template = {"metadata": {"labels": {JOB_LABEL: spec.name}}, "spec": _pod(spec, [container], volumes)}
    job = {"backoffLimit": 2, "template": template}
    return [_object("batch/v1", "Job", spec, f"{spec.name}-prepare", {"spec": job})]


def elasticjob(spec: JobSpec) -> list[Tree]:
    """DLRover's job: a master that makes the worker pods."""
    replicas = {
        "dlrover-master": {"replicas": 1, "restartCount": 100, "template": {"spec": _master(spec)}},
        "worker": {
            "replicas": spec.nodes,
            "restartCount": 100,
            "autoScale": False,
            "template": {"spec": _worker(spec)},
        },
    }
    job = {"distributionStrategy": "AllreduceStrategy", "optimizeMode": "single-job", "replicaSpecs": replicas}
    return [_object(f"{GROUP}/v1alpha1", "ElasticJob", spec, spec.name, {"spec": job})]


def prompt(spec: JobSpec) -> list[Tree]:
    """A pod in which a person talks to the model."""
    args = ["elastic-gpt", "generate", spec.run_dir]
    mounts = _workspace_mounts(spec, readOnly=True)
    container = _container(spec, "prompt", args, cpu="1", memory=_memory_of_a_model(spec), mounts=mounts)
    container |= {"stdin": True, "stdinOnce": True, "tty": True}
    return [_object("v1", "Pod", spec, f"{spec.name}-prompt", {"spec": _pod(spec, [container], _workspace(spec))})]


def serve(spec: JobSpec) -> list[Tree]:
    """The model over HTTP: a Deployment that follows the run, and a Service in front of it."""
    args = ["elastic-gpt", "serve", spec.run_dir, "--follow", f"--name={spec.name}", "--host=0.0.0.0"]
    mounts = _workspace_mounts(spec, readOnly=True)
    container = _container(spec, "serve", args, cpu="2", memory=_memory_of_a_model(spec), mounts=mounts)
    name = f"{spec.name}-serve"
    token = {"secretKeyRef": {"name": name, "key": "token", "optional": True}}
    container["env"] += [{"name": "OMP_NUM_THREADS", "value": "2"}, {"name": "ELASTIC_GPT_TOKEN", "valueFrom": token}]
    container |= {
        "ports": [{"name": "http", "containerPort": SERVE_PORT}],
        "startupProbe": _probe("/health", periodSeconds=5, failureThreshold=720),
        "livenessProbe": _probe("/health", periodSeconds=10, failureThreshold=3),
        "readinessProbe": _probe("/ready", periodSeconds=2, failureThreshold=2),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(LEAVE_SECONDS)]}}},
    }
    pod = _pod(spec, [container], _workspace(spec), restartPolicy="Always", terminationGracePeriodSeconds=DRAIN_SECONDS)
    labels = {SERVE_LABEL: spec.name}
    deployment = {
        "replicas": 1,
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    service = {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}
    return [
        _object("apps/v1", "Deployment", spec, name, {"spec": deployment}),
        _object("v1", "Service", spec, name, {"spec": service}),
    ]


def shell(spec: JobSpec) -> list[Tree]:
    """A pod that only holds the volume: to copy texts to it, and to look at runs."""
    mounts = _workspace_mounts(spec)
    container = _container(spec, "shell", ["sleep", "infinity"], cpu="1", memory="2Gi", mounts=mounts)
    return [_object("v1", "Pod", spec, f"{spec.name}-shell", {"spec": _pod(spec, [container], _workspace(spec))})]


PARTS: dict[str, Callable[[JobSpec], list[Tree]]] = {
    "namespace": namespace,
    "volume": volume,
    "rbac": rbac,
    "text": text,
    "prepare": prepare,
    "job": elasticjob,
    "prompt": prompt,
    "serve": serve,
    "shell": shell,
}
"""In the order in which they are applied."""
JOB_PARTS = ("namespace", "volume", "rbac", "text", "prepare", "job")


def manifests(spec: JobSpec, parts: tuple[str, ...] = JOB_PARTS) -> list[Tree]:
    """The objects of `parts`; by default of those that make up a job."""
    return [tree for part in PARTS if part in parts for tree in PARTS[part](spec)]


def _master(spec: JobSpec) -> Tree:
    args = ["elastic-gpt", "master", f"--namespace={spec.namespace}", f"--job-name={spec.name}"]
    if spec.oom_restarts != JobSpec.oom_restarts:
        args.append(f"--oom-restarts={spec.oom_restarts}")
    keyless = replace(spec, env_secret="")  # it reads neither data nor runs
    container = _container(keyless, "main", args, **MASTER_NEEDS, mounts=[])
    account = {"serviceAccountName": MASTER, "automountServiceAccountToken": True}
    return _pod(spec, [container], [], **account, affinity=_prefer("NotIn") if spec.spot else {})


def _worker(spec: JobSpec) -> Tree:
    args = ["elastic-gpt", "launch", f"--nnodes={spec.min_nodes}:{spec.used_max_nodes}", f"--nproc={spec.workers}"]
    args += ["--network-check"] if spec.network_check else []
    args += ["--", "train", *spec.training]
    mounts = [*_workspace_mounts(spec), _mount("snapshots", "/dev/shm")]
    # DLRover adds its environment to the container that is called main.
    main = _container(spec, "main", args, cpu=str(spec.used_cpus), memory=f"{spec.memory_gib}Gi", mounts=mounts)
    # Torch counts the machine's cores, not the pod's share of them.
    env = {"OMP_NUM_THREADS": str(max(1, spec.used_cpus // spec.workers))} | dict(spec.env)
    main["env"] += [{"name": name, "value": value} for name, value in env.items()]
    if spec.gpus:
        for bound in ("requests", "limits"):
            main["resources"][bound]["nvidia.com/gpu"] = str(spec.gpus)
    snapshots = {"name": "snapshots", "emptyDir": {"medium": "Memory", "sizeLimit": f"{spec.shm_gib}Gi"}}
    return _pod(
        spec,
        [main],
        [*_workspace(spec), snapshots],
        terminationGracePeriodSeconds=30,
        initContainers=_wait_for_data(spec),
        nodeSelector=dict(spec.node_selector),
        affinity=_prefer("In") if spec.spot else {},
        tolerations=[GPU_TAINT] * bool(spec.gpus) + SPOT_TAINTS * spec.spot,
    )


def _wait_for_data(spec: JobSpec) -> list[Tree]:
    """The init container for data that may still be made: on the volume, or on an object store by this job."""
    if "://" not in spec.data_dir:
        wait = ["sh", "-c", f"until test -e {spec.data_dir}/meta.json; do sleep 2; done"]
        mounts = _workspace_mounts(spec, readOnly=True)
        return [_container(spec, "wait-for-data", wait, cpu="100m", memory="64Mi", mounts=mounts)]
    if not spec.prepares:
        return []
    wait = ["elastic-gpt", "prepare", "--wait", f"--output-dir={spec.data_dir}"]
    return [_container(spec, "wait-for-data", wait, cpu="100m", memory="512Mi", mounts=[])]


def _object(version: str, kind: str, spec: JobSpec, name: str, rest: Tree, labels: Tree | None = None) -> Tree:
    metadata: Tree = {"name": name, "namespace": spec.namespace}
    labels = {JOB_LABEL: spec.name} if labels is None else labels
    return {"apiVersion": version, "kind": kind, "metadata": metadata | ({"labels": labels} if labels else {}), **rest}


def _pod(spec: JobSpec, containers: list[Tree], volumes: list[Tree], **more: Any) -> Tree:
    """A pod that the policy `restricted` admits. Empty values in `more` are left out."""
    context: Tree = {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER}
    if volumes:
        context |= {"fsGroup": USER, "fsGroupChangePolicy": "OnRootMismatch"}
    pod: Tree = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "imagePullSecrets": [{"name": spec.pull_secret}] if spec.pull_secret else [],
        "securityContext": context | {"seccompProfile": {"type": "RuntimeDefault"}},
        "initContainers": [],
        **more,
        "containers": containers,
        "volumes": [*volumes, {"name": "scratch", "emptyDir": {}}],
    }
    return {key: value for key, value in pod.items() if value not in ([], {})}


def _container(spec: JobSpec, name: str, args: list[str], *, cpu: str, memory: str, mounts: list[Tree]) -> Tree:
    resources = {"cpu": cpu, "memory": memory}
    return {
        "name": name,
        "image": spec.used_image,
        "imagePullPolicy": "IfNotPresent",
        "args": args,
        # Files outside the volume (compiled kernels, sockets) go to a folder that ends with the pod.
        "env": [{"name": "HOME", "value": "/tmp"}],
        **({"envFrom": [{"secretRef": {"name": spec.env_secret}}]} if spec.env_secret else {}),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": {"requests": resources, "limits": dict(resources)},
        "volumeMounts": [*mounts, _mount("scratch", "/tmp")],
    }


def _memory_of_a_model(spec: JobSpec) -> str:
    """Memory for torch, and for the weights twice while they are loaded."""
    return f"{2 + -(-4 * 2 * spec.parameters // 2**30)}Gi"


def _probe(path: str, **when: int) -> Tree:
    return {"httpGet": {"path": path, "port": "http"}, **when}


def _mount(name: str, path: str) -> Tree:
    return {"name": name, "mountPath": path}


def _workspace(spec: JobSpec) -> list[Tree]:
    """The volume of a pod, if the job has one."""
    claim = {"name": "workspace", "persistentVolumeClaim": {"claimName": spec.volume}}
    return [claim] if spec.needs_volume else []


def _workspace_mounts(spec: JobSpec, **more: bool) -> list[Tree]:
    return [{**_mount("workspace", str(WORKSPACE)), **more}] if spec.needs_volume else []


def _prefer(operator: str) -> Tree:
    """Prefer spot machines (`In`) or other machines (`NotIn`)."""
    words = [{"key": key, "operator": operator, "values": [value]} for key, value in SPOT_LABELS.items()]
    # A spot machine has one of these labels; others have none of them.
    terms = [[word] for word in words] if operator == "In" else [words]
    preferred = [{"weight": 100, "preference": {"matchExpressions": term}} for term in terms]
    return {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}
