"""Talks to the API server. Only this module imports the `kubernetes` package. Objects are plain dicts.

The configuration is found as kubectl finds it: --kubeconfig, the variable KUBECONFIG,
~/.kube/config, then the service account of the pod that this runs in.
"""

import contextlib
import json
import logging
import os
import re
import shlex
import ssl
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import urllib3.exceptions
from kubernetes import client, config, stream
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from kubernetes.utils.quantity import parse_quantity

from elastic_gpt.jobs import trainjob
from elastic_gpt.jobs.manifest import GROUP, Tree

CONNECT_SECONDS, READ_SECONDS = 5, 30
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

OPERATOR_VERSION = "v0.6.1"
# DLRover's own kustomization does not start, and does not know spec.suspend (kustomization.yaml there says why).
INSTALL_OPERATOR = f"kubectl apply -k {shlex.quote(str(Path(__file__).with_name('install')))}"
INSTALL_DEFINITION = (
    f"kubectl apply -f https://raw.githubusercontent.com/intelligent-machine-learning/dlrover/{OPERATOR_VERSION}/go/elasticjob"
    "/config/crd/bases/elastic.iml.github.io_elasticjobs.yaml"
)

INSTALL_TRAINER = (
    "kubectl apply --server-side -k 'https://github.com/kubeflow/trainer.git/manifests/overlays/manager?ref=v2.1.0'"
)

# Kind to its API, resource, and whether its objects belong to a namespace.
KINDS = {
    "Namespace": ("/api/v1", "namespaces", False),
    "Node": ("/api/v1", "nodes", False),
    "PersistentVolumeClaim": ("/api/v1", "persistentvolumeclaims", True),
    "Pod": ("/api/v1", "pods", True),
    "Secret": ("/api/v1", "secrets", True),
    "Service": ("/api/v1", "services", True),
    "ServiceAccount": ("/api/v1", "serviceaccounts", True),
    "ConfigMap": ("/api/v1", "configmaps", True),
    "ResourceQuota": ("/api/v1", "resourcequotas", True),
    "Event": ("/api/v1", "events", True),
    "Deployment": ("/apis/apps/v1", "deployments", True),
    "Job": ("/apis/batch/v1", "jobs", True),
    "StorageClass": ("/apis/storage.k8s.io/v1", "storageclasses", False),
    "Role": ("/apis/rbac.authorization.k8s.io/v1", "roles", True),
    "RoleBinding": ("/apis/rbac.authorization.k8s.io/v1", "rolebindings", True),
    "CustomResourceDefinition": ("/apis/apiextensions.k8s.io/v1", "customresourcedefinitions", False),
    "ElasticJob": (f"/apis/{GROUP}/v1alpha1", "elasticjobs", True),
    "TrainJob": (f"/apis/{trainjob.GROUP}/v1alpha1", "trainjobs", True),
    "TrainingRuntime": (f"/apis/{trainjob.GROUP}/v1alpha1", "trainingruntimes", True),
}


class ClusterError(ValueError):
    """The cluster refused something. The message is one line with the cure."""


class NotFoundError(ClusterError):
    """There is no such object."""


class ExistsError(ClusterError):
    """An object of this name exists already."""


class ForbiddenError(ClusterError):
    """The user may not do this."""


class UnknownKindError(ClusterError):
    """The cluster does not know ElasticJobs, or TrainJobs."""


class UnreachableError(ClusterError, ConnectionError):
    """The server does not answer now; another try may help."""


class Cluster:
    """A connection to one namespace of a cluster. Every method may raise ClusterError."""

    def __init__(self, api: client.ApiClient, namespace: str, kubectl_flags: tuple[str, ...] = ()) -> None:
        self.api, self.namespace = api, namespace
        self.kubectl_flags = kubectl_flags  # flags with which kubectl uses the same cluster

    @classmethod
    def connect(cls, *, kubeconfig: str | None, context: str | None, namespace: str | None, default: str) -> "Cluster":
        """Args:
        namespace: given by the user; None: that of the context, or `default` if the context has none.
        """
        settings = client.Configuration()
        here = default
        path = kubeconfig or os.environ.get("KUBECONFIG") or str(Path(config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION))
        files = [Path(one).expanduser() for one in path.split(os.pathsep) if one]
        if kubeconfig or context or any(file.exists() for file in files):
            try:
                contexts, active = config.list_kube_config_contexts(config_file=path)
                names = [one["name"] for one in contexts]
                if context and context not in names:
                    raise ClusterError(f"no context '{context}' in {path}: choose from {', '.join(names)}")
                with _logged_errors() as failed:
                    config.load_kube_config(config_file=path, context=context, client_configuration=settings)
                if failed:
                    raise ClusterError(
                        f"the command in {path} that logs in failed ({_line(failed[0])}): try it with `kubectl get pods`"
                    )
            except ClusterError:
                raise
            except Exception as error:  # a broken file raises errors of many kinds in the library
                why = "too deeply nested" if isinstance(error, RecursionError) else _line(error)
                raise ClusterError(f"{path} is no kubeconfig ({why}): name another with --kubeconfig") from error
            try:
                parts = urlsplit(settings.host)
                usable = (
                    parts.scheme in ("http", "https") and re.fullmatch(r"\S+", parts.hostname or "") and parts.port != 0
                )
            except ValueError:
                usable = False
            if not usable:
                raise ClusterError(
                    f"the server in {path} is '{settings.host}', which is not a web address: write https://HOST:PORT there, or"
                    " take another --context"
                )
            chosen = next((one for one in contexts if one["name"] == context), active) or {}
            here = chosen.get("context", {}).get("namespace") or default
        else:
            try:
                config.load_incluster_config(client_configuration=settings)
            except ConfigException:
                raise ClusterError(
                    f"no cluster: {path} is not there; set KUBECONFIG or --kubeconfig to the file that your cluster's"
                    " provider gives"
                ) from None
            here = SERVICE_ACCOUNT.read_text().strip()
        settings.retries = 1
        flags = (f"--kubeconfig={kubeconfig}",) * bool(kubeconfig) + (f"--context={context}",) * bool(context)
        return cls(client.ApiClient(settings), namespace or here, flags)

    @property
    def server(self) -> str:
        return str(self.api.configuration.host)

    def version(self) -> str:
        """The server's version of Kubernetes."""
        return str(self._object("GET", "/version").get("gitVersion", ""))

    def get(self, kind: str, name: str, namespace: str | None = None) -> Tree:
        return self._object("GET", f"{self._path(kind, namespace)}/{quote(name, safe='')}")

    def find(self, kind: str, name: str, namespace: str | None = None) -> Tree | None:
        """The object, or None if there is none."""
        try:
            return self.get(kind, name, namespace)
        except NotFoundError:
            return None

    def select(
        self, kind: str, *, labels: str = "", fields: str = "", namespace: str | None = None, everywhere: bool = False
    ) -> list[Tree]:
        path = self._path(kind, namespace, everywhere=everywhere)
        query = {"labelSelector": labels, "fieldSelector": fields}
        answer = self._object("GET", path, query={key: value for key, value in query.items() if value})
        return list(answer.get("items") or [])

    def create(self, tree: Tree, *, dry_run: bool = False) -> Tree:
        """Make an object. Raises ExistsError if it exists. `dry_run`: the server checks it but does not keep it."""
        path = self._path(tree["kind"], tree["metadata"].get("namespace"))
        query = {"fieldManager": "elastic-gpt"} | ({"dryRun": "All"} if dry_run else {})
        return self._object("POST", path, body=tree, query=query)

    def patch(self, kind: str, name: str, changes: Tree) -> Tree:
        """Apply a JSON merge patch: the fields in `changes` are replaced, in one transaction."""
        return self._object("PATCH", f"{self._path(kind)}/{name}", body=changes, content="application/merge-patch+json")

    def delete(self, kind: str, name: str) -> bool:
        """Delete an object and what it owns. Returns whether it existed."""
        try:
            self._object("DELETE", f"{self._path(kind)}/{name}", query={"propagationPolicy": "Background"})
        except NotFoundError:
            return False
        return True

    def allowed(self, verb: str, kind: str, namespace: str | None = None, subresource: str = "") -> bool:
        """Whether this user may do `verb` with objects of this kind."""
        api, resource, namespaced = KINDS[kind]
        group = api.split("/")[2] if api.startswith("/apis/") else ""
        what = {"verb": verb, "group": group, "resource": resource, "subresource": subresource}
        if namespaced:
            what["namespace"] = namespace or self.namespace
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
        body = review | {"spec": {"resourceAttributes": what}}
        answer = self._object("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body=body)
        return bool(answer["status"]["allowed"])

    def log(
        self, pod: str, *, tail: int | None = None, previous: bool = False, container: str = "", namespace: str | None = None
    ) -> list[str]:  # fmt: skip
        """The lines of a pod's log, each with its time in front. [] for a pod that has not started."""
        query: dict[str, Any] = {"timestamps": "true"} | ({"tailLines": tail} if tail is not None else {})
        query |= ({"previous": "true"} if previous else {}) | ({"container": container} if container else {})
        return list(self._lines(pod, query, namespace))

    def follow(self, pod: str, *, since: str = "", tail: int | None = None) -> Iterator[str]:
        """The lines of a pod's log as they come, each with its time in front, until the pod or the connection ends."""
        query: dict[str, Any] = {"timestamps": "true", "follow": "true"}
        query |= {"sinceTime": since} if since else {"tailLines": tail} if tail is not None else {}
        return self._lines(pod, query)

    def attach(self, pod: str, container: str) -> Any:
        """A websocket to the pod's terminal (kubernetes.stream.ws_client.WSClient) that sends and receives bytes."""
        core = client.CoreV1Api(self.api)
        try:
            return stream.stream(
                core.connect_get_namespaced_pod_attach, pod, self.namespace, container=container,
                stdin=True, stdout=True, stderr=True, tty=True, binary=True, _preload_content=False,
            )  # fmt: skip
        except ApiException as error:
            raise ClusterError(f"pod {pod} cannot be attached to: {_line(error.reason)}") from error

    def _lines(self, pod: str, query: dict[str, Any], namespace: str | None = None) -> Iterator[str]:
        path = f"{self._path('Pod', namespace)}/{pod}/log"
        # A stream has no time limit, since a pod may write nothing for long.
        limit = (CONNECT_SECONDS, None if "follow" in query else READ_SECONDS)
        response = self._call("GET", path, query=query, stream=True, timeout=limit)
        rest = b""
        try:
            for piece in response.stream(amt=None, decode_content=False):
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    yield line.decode(errors="replace")
        except (urllib3.exceptions.HTTPError, OSError):
            pass  # the caller connects again, from the last line on
        finally:
            response.close()
        if rest:
            yield rest.decode(errors="replace")

    def _path(self, kind: str, namespace: str | None = None, *, everywhere: bool = False) -> str:
        api, resource, namespaced = KINDS[kind]
        if everywhere or not namespaced:
            return f"{api}/{resource}"
        return f"{api}/namespaces/{quote(namespace or self.namespace, safe='')}/{resource}"

    def _object(self, method: str, path: str, **how: Any) -> Tree:
        return dict(json.loads(self._call(method, path, **how).data))

    def _call(
        self, method: str, path: str, *, body: Tree | None = None, query: dict[str, Any] | None = None,
        content: str = "application/json", stream: bool = False, timeout: Any = (CONNECT_SECONDS, READ_SECONDS),
    ) -> Any:  # fmt: skip
        headers: dict[str, str] = {"Accept": "*/*" if stream else "application/json", "Content-Type": content}
        self.api.update_params_for_auth(headers, [], ["BearerToken"])
        url = self.server + path + (f"?{urlencode(query)}" if query else "")
        try:
            response = self.api.rest_client.pool_manager.request(
                method, url, body=json.dumps(body) if body is not None else None, headers=headers,
                preload_content=False, timeout=urllib3.Timeout(connect=timeout[0], read=timeout[1]),
            )  # fmt: skip
            if response.status >= 300:
                raise self._refused(response.status, response.data, path, body)
            if not stream:
                response.data  # noqa: B018  reads it, so that what breaks breaks here
        except (urllib3.exceptions.HTTPError, OSError, ssl.SSLError) as error:
            raise UnreachableError(
                f"{self.server} does not answer ({_reason(error)}): is it the right --context, and is the cluster up?"
            ) from error
        return response

    def _refused(self, status: int, data: bytes, path: str, body: Tree | None) -> ClusterError:
        """The error for a failed request, from the server's status."""
        try:
            told = json.loads(data)
            message, reason = _line(told.get("message", "")), told.get("reason", "")
        except ValueError:
            message, reason = _line(data.decode(errors="replace"))[:200], ""
        if status == 404 and reason != "NotFound" and GROUP in path:
            return UnknownKindError(
                f"this cluster knows no ElasticJobs: install DLRover's operator: {INSTALL_OPERATOR}"
            )
        if status == 404 and reason != "NotFound" and trainjob.GROUP in path:
            return UnknownKindError(f"this cluster knows no TrainJobs: install Kubeflow Trainer: {INSTALL_TRAINER}")
        if status == 404:
            return NotFoundError(message)
        if status == 401:
            return ClusterError(f"{self.server} does not know you ({message}): log in again, or take another --context")
        if status == 403:
            return ForbiddenError(f"not allowed: {message}; `elastic-gpt job doctor` tells which rights are needed")
        if status == 409 and reason == "AlreadyExists":
            return ExistsError(message)
        what = f"{body['kind']} {body['metadata']['name']}: " if body and "kind" in body and "name" in body.get(
            "metadata", {}
        ) else ""  # fmt: skip
        return ClusterError(f"{what}{message or f'the server answers {status}'}")


def quantity(text: str) -> Decimal:
    """The value of a quantity as Kubernetes writes it, such as 500m or 2Gi."""
    return Decimal(parse_quantity(text))


@contextlib.contextmanager
def _logged_errors() -> Iterator[list[str]]:
    """Collects errors that are logged: the kubernetes package only logs that a login command failed."""
    told: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    ear = Ear(logging.ERROR)
    logging.getLogger().addHandler(ear)
    try:
        yield told
    finally:
        logging.getLogger().removeHandler(ear)


def _line(text: object) -> str:
    return " ".join(str(text).split())


def _reason(error: BaseException) -> str:
    """The innermost cause of a failed connection, in a few words."""
    if isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason:
        error = error.reason
    text = _line(error)
    return text.rpartition(": ")[2].strip("()'") or type(error).__name__
