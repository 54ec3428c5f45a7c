"""A stand-in for the API server, and a job on it: keeps objects and answers the client's few calls.

tests/cluster has a real one.
"""

import copy
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from elastic_gpt.contract import Progress
from elastic_gpt.jobs.client import KINDS
from elastic_gpt.jobs.manifest import manifests
from elastic_gpt.jobs.spec import JobSpec
from tests.conftest import until

Tree = dict[str, Any]
RESOURCES = {resource: kind for kind, (_, resource, _) in KINDS.items()}
PATH = re.compile(
    r"/(?:api|apis/[^/]+)/v1(?:alpha1)?(?:/namespaces/(?P<ns>[^/]+))?/(?P<res>[a-z]+)(?:/(?P<name>[^/]+))?(?P<log>/log)?"
)


class StubCluster:
    """Objects by kind, namespace and name; logs by pod.

    What a test may set: `forbidden` (kinds that this user may not create or list), `narrow` (kinds that this user may list in
    one namespace only), `unknown` (kinds that the cluster does not know), `drops` (fields of an ElasticJob's spec that an old
    definition has not), `grace` (how many times the pods of a deleted ElasticJob are still
    listed, as those of a cluster are until they have ended).
    """

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Tree] = {}
        self.logs: dict[str, list[str]] = {}
        self.forbidden: set[str] = set()
        self.narrow: set[str] = set()
        self.unknown: set[str] = set()
        self.grace = 0
        self.ending: dict[tuple[str, str, str], int] = {}
        self.drops: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else {}
                code, content = stub.answer(self.command, self.path, body)
                data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PATCH = do_DELETE = answer

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def kubeconfig(self, folder: Path, namespace: str | None = "training") -> Path:
        context = {"cluster": "stub", "user": "me"} | ({"namespace": namespace} if namespace else {})
        path = folder / "kubeconfig"
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "stub",
                    "clusters": [
                        {"name": "stub", "cluster": {"server": f"http://127.0.0.1:{self.server.server_address[1]}"}}
                    ],
                    "users": [{"name": "me", "user": {"token": "secret"}}],
                    "contexts": [{"name": "stub", "context": context}],
                }
            )
        )
        return path

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, tree: Tree) -> Tree:
        metadata = tree["metadata"]
        namespaced = KINDS[tree["kind"]][2]
        metadata.setdefault("creationTimestamp", "2026-11-21T10:00:00Z")
        self.objects[tree["kind"], metadata.get("namespace", "") if namespaced else "", metadata["name"]] = tree
        return tree

    def pod(self, name: str, labels: Tree, phase: str = "Running", **status: Any) -> Tree:
        metadata = {"name": name, "namespace": "training", "labels": labels}
        spec = {"nodeName": "machine", "containers": [{"name": "main", "image": "elastic-gpt:0.1.0"}]}
        return self.add({"kind": "Pod", "metadata": metadata, "spec": spec, "status": {"phase": phase, **status}})

    def master(self, job: str, number: int = 0, phase: str = "Running", **status: Any) -> Tree:
        labels = {"elasticjob.dlrover/name": job, "elasticjob.dlrover/replica-type": "dlrover-master"}
        return self.pod(f"elasticjob-{job}-dlrover-master-{number}", labels, phase, **status)

    def worker(self, job: str, rank: int, phase: str = "Running", **status: Any) -> Tree:
        labels = {"elasticjob.dlrover/name": job, "elasticjob.dlrover/replica-type": "worker"}
        labels |= {f"elasticjob.dlrover/{kind}-index": str(rank) for kind in ("replica", "rank")}
        labels |= {"elasticjob.dlrover/relaunch-count": "0"}
        return self.pod(f"{job}-edljob-worker-{rank}", labels, phase, **status)

    def get(self, kind: str, name: str, namespace: str = "training") -> Tree | None:
        return self.objects.get((kind, namespace if KINDS[kind][2] else "", name))

    def answer(self, method: str, url: str, body: Tree) -> tuple[int, Any]:
        parts = urlsplit(url)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.requests.append((method, parts.path))
        if parts.path == "/version":
            return 200, {"gitVersion": "v1.32.0"}
        if parts.path.endswith("selfsubjectaccessreviews"):
            resource = body["spec"]["resourceAttributes"]["resource"]
            return 201, {"status": {"allowed": RESOURCES[resource] not in self.forbidden}}
        match = PATH.fullmatch(parts.path)
        assert match, parts.path
        if match["log"]:
            if ("Pod", match["ns"], match["name"]) not in self.objects:
                return self.refuse(404, "NotFound", f'pods "{match["name"]}" not found')
            lines = self.logs.get(match["name"], [])
            lines = lines[max(0, len(lines) - int(query.get("tailLines", len(lines)))) :]
            return 200, "".join(f"{line}\n" for line in lines)
        kind = RESOURCES[match["res"]]
        namespace = (match["ns"] or "") if KINDS[kind][2] else ""
        if kind in self.unknown:
            return 404, "404 page not found"
        if kind in self.forbidden or (kind in self.narrow and not namespace):
            return self.refuse(403, "Forbidden", f'{match["res"]} is forbidden: User "me" cannot {method} it')
        name = match["name"] or ""
        if method == "POST":
            return self.create(kind, namespace, body, dry_run="dryRun" in query)
        if not name:
            wanted = [word.partition("=") for word in query.get("labelSelector", "").split(",") if word]
            called = query.get("fieldSelector", "").removeprefix("metadata.name=")
            items = [
                tree
                for (of, where, its), tree in list(self.objects.items())
                if of == kind
                and namespace in ("", where)
                and called in ("", its)
                and all(has_label(tree, *word) for word in wanted)
            ]
            if kind == "Pod":
                self.end_pods()
            return 200, {"items": items}
        tree = self.objects.get((kind, namespace, name))
        if tree is None:
            return self.refuse(404, "NotFound", f'{match["res"]} "{name}" not found')
        if method == "DELETE":
            del self.objects[kind, namespace, name]
            if kind == "ElasticJob":
                self.collect(name, namespace)
        elif method == "PATCH":
            merge(tree, body)
            self.prune(tree)
        return 200, tree

    def collect(self, job: str, namespace: str) -> None:
        """The garbage collector: a job's pods go after it, once they have been listed `grace` times."""
        owned = [key for key, tree in self.objects.items() if key[:2] == ("Pod", namespace)
                 and has_label(tree, "elasticjob.dlrover/name", "=", job)]  # fmt: skip
        for key in owned:
            self.objects[key]["metadata"]["deletionTimestamp"] = "2026-11-21T10:00:05Z"
            self.ending[key] = self.grace + 1
        self.end_pods()

    def end_pods(self) -> None:
        for key in list(self.ending):
            self.ending[key] -= 1
            if self.ending[key] <= 0:
                del self.ending[key]
                self.objects.pop(key, None)

    def create(self, kind: str, namespace: str, body: Tree, *, dry_run: bool) -> tuple[int, Any]:
        name = body["metadata"]["name"]
        if KINDS[kind][2] and ("Namespace", "", namespace) not in self.objects:
            return self.refuse(404, "NotFound", f'namespaces "{namespace}" not found')
        if (kind, namespace, name) in self.objects:
            return self.refuse(409, "AlreadyExists", f'{kind} "{name}" already exists')
        tree = copy.deepcopy(body)
        self.prune(tree)
        if not dry_run:
            self.add(tree)
        return 201, tree

    def prune(self, tree: Tree) -> None:
        if tree["kind"] == "ElasticJob":
            for field in self.drops:
                tree["spec"].pop(field, None)

    @staticmethod
    def refuse(code: int, reason: str, message: str) -> tuple[int, Any]:
        return code, {"kind": "Status", "status": "Failure", "reason": reason, "message": message, "code": code}


def has_label(tree: Tree, key: str, equals: str, value: str) -> bool:
    labels = tree["metadata"].get("labels", {})
    return key in labels and (not equals or labels[key] == value)


def merge(tree: Tree, changes: Tree) -> None:
    """A JSON merge patch."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        elif value is None:
            tree.pop(key, None)
        else:
            tree[key] = value


def entry(second: int, text: str) -> str:
    return f"2026-11-21T10:00:{second:02d}.000000001Z {text}"


def progress(second: int, workers: int, step: int = 0, **more: Any) -> str:
    """A line of a log in which training tells how far it is; without a loss no step has been done yet."""
    return entry(second, Progress(1_800_000_000.0 + second, step, 100, workers=workers, **more).to_line())


def running(stub: StubCluster, nodes: int = 2, **changes: Any) -> dict[str, Any]:
    """A job that trains on `nodes` nodes."""
    for tree in manifests(JobSpec(nodes=nodes)):
        stub.add(tree)
    tree = stub.get("ElasticJob", "elastic-gpt")
    assert tree
    tree["status"] = {"phase": "Running"} | changes
    for rank in range(nodes):
        stub.worker("elastic-gpt", rank)
    stub.master("elastic-gpt")
    stub.logs["elastic-gpt-edljob-worker-0"] = [
        progress(1, nodes),
        progress(2, nodes, step=10, loss=2.5, tokens_per_second=1234.0),
    ]
    return tree


def later(stub: StubCluster, action: Callable[[], Any]) -> None:
    """Do `action` after the client has sent so many requests that it has looked at least once."""
    before = len(stub.requests)

    def wait() -> None:
        until(lambda: len(stub.requests) > before + 14)
        action()

    threading.Thread(target=wait, daemon=True).start()
