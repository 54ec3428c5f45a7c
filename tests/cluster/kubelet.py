"""A stand-in for kubelet and container runtime: pods as processes in namespaces of their own, on one or more pretended nodes.

What it does as the real ones do: registers nodes with a capacity, so that the real scheduler places the pods; runs init
containers, then containers, each with its own mounts (volumes, /tmp, /dev/shm), host name, process tree and user, a root file
system over this machine's (read-only where asked), and the entrypoint of our image (tini); reports phases, states and exit
codes; keeps a container's last word (/dev/termination-log); refuses images it does not have; ends pods with SIGTERM, a grace
time, then SIGKILL; serves logs, attach and exec (the streams of both by kubelet_server, which is Kubernetes' own code).

What it does not: several containers of a pod at a time, networks (all pods share this machine's, and services resolve to
loopback), limits on cpu and memory, probes other than the first success of a readiness probe, hooks, a terminal for exec.
"""

import base64
import contextlib
import datetime
import http.server
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import termios
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kubernetes import client

POLL_SECONDS = 0.3
MOMENT = "%Y-%m-%dT%H:%M:%S.%fZ"
Manifest = dict[str, Any]


class Kubelet:
    """Runs the pods of `nodes` (name to capacity) until closed."""

    def __init__(
        self,
        api: client.ApiClient,
        folder: Path,
        *,
        nodes: dict[str, Manifest],
        images: set[str],
        content: list[Path],
        environment: dict[str, str],
        server: Path,
    ) -> None:
        """Args:
        folder: for logs and volumes; it must hold server.crt and server.key.
        images: names of images that count as pulled.
        content: folders of this machine that are in all of them.
        environment: variables of them.
        server: kubelet_server, built.
        """
        self._core = client.CoreV1Api(api)
        self._folder = folder
        self._images, self._content, self._environment = images, content, environment
        self._pods: dict[str, Pod] = {}
        self._stopped = threading.Event()
        self._down: set[str] = set()
        self._backend = _backend(self)
        url = f"http://127.0.0.1:{self._backend.server_address[1]}"
        words = [server, folder / "server.crt", folder / "server.key", url]
        self._server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._server.stdout
        self._port = int(self._server.stdout.readline())
        self.api_host = api.configuration.host
        self._nodes: set[str] = set()
        for name, capacity in nodes.items():
            self.add_node(name, capacity)
        for target in (self._backend.serve_forever, self._sync_forever, self._heartbeat_forever):
            threading.Thread(target=target, daemon=True).start()

    def close(self) -> None:
        self._stopped.set()
        for pod in self._pods.values():
            pod.kill()
        self._server.communicate()  # it ends with its standard input
        self._backend.shutdown()

    def pod(self, namespace: str, name: str) -> "Pod | None":
        found = [pod for pod in self._pods.values() if (pod.namespace, pod.name) == (namespace, name)]
        return found[-1] if found else None

    def lose_node(self, name: str) -> None:
        """Lose a machine: no processes, no heartbeat, and (as with a cloud's controller) no Node object."""
        self._down.add(name)
        for pod in self._pods.values():
            if pod.node == name:
                pod.silent = True
                pod.kill()
        self._core.delete_node(name)

    # -- nodes

    def add_node(self, name: str, capacity: Manifest) -> None:
        """Register a machine, a new one or one that was lost."""
        capacity = {"pods": "20"} | capacity
        with contextlib.suppress(client.ApiException):
            self._core.delete_node(name)
        self._core.create_node({"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}})
        status = {
            "capacity": capacity,
            "allocatable": capacity,
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}, {"type": "Hostname", "address": name}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._port}},
        }
        self._core.patch_node_status(name, {"status": status | _ready()})
        self._nodes.add(name)
        self._down.discard(name)

    def _heartbeat_forever(self) -> None:
        while not self._stopped.wait(5):
            for name in self._nodes - self._down:
                with contextlib.suppress(Exception):
                    self._core.patch_node_status(name, {"status": _ready()})

    # -- pods

    def _sync_forever(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            with contextlib.suppress(Exception):
                self._sync()

    def _list(self, path: str) -> list[Manifest]:
        answer = self._core.api_client.call_api(path, "GET", auth_settings=["BearerToken"], _preload_content=False)
        return list(json.loads(answer[0].data)["items"])

    def _sync(self) -> None:
        services = [service["metadata"] for service in self._list("/api/v1/services")]
        present = set()
        for manifest in self._list("/api/v1/pods"):
            meta, node = manifest["metadata"], manifest["spec"].get("nodeName")
            if node not in self._nodes - self._down:
                continue
            present.add(meta["uid"])
            pod = self._pods.get(meta["uid"])
            if pod is None and manifest["status"].get("phase") not in ("Succeeded", "Failed"):
                pod = self._pods[meta["uid"]] = Pod(self._core, self._folder, manifest, self)
            if pod:
                pod.write_hosts([service["name"] for service in services if service["namespace"] == meta["namespace"]])
            if "deletionTimestamp" in meta:
                if pod is None:
                    self._finalize(meta["namespace"], meta["name"])
                else:
                    pod.terminate(meta.get("deletionGracePeriodSeconds", 30))
        for uid, pod in self._pods.items():
            if uid not in present:
                pod.kill()  # deleted by force

    def _finalize(self, namespace: str, name: str) -> None:
        with contextlib.suppress(client.ApiException):
            self._core.delete_namespaced_pod(name, namespace, grace_period_seconds=0)


class Pod:
    """One pod: a thread that runs its containers and reports their state."""

    def __init__(self, core: client.CoreV1Api, folder: Path, manifest: Manifest, kubelet: Kubelet) -> None:
        self._core, self._kubelet, self.manifest = core, kubelet, manifest
        meta = manifest["metadata"]
        self.namespace, self.name, self.uid = meta["namespace"], meta["name"], meta["uid"]
        self.node = manifest["spec"]["nodeName"]
        self.folder = folder / "pods" / f"{self.name}-{self.uid[:8]}"
        self.folder.mkdir(parents=True)
        self.silent = False
        self._terminating = threading.Event()
        self._deleted, self._ended = False, threading.Event()
        self.killed = False  # while it ran
        self.out_of_memory = False  # whether that was for its memory
        self._no_grace = False
        self._process: subprocess.Popen[bytes] | None = None
        self._terminal: int | None = None  # our side of it
        self._watchers: list[socket.socket] = []  # who is attached
        self._states: dict[str, Manifest] = {}
        self._unready = {one["name"] for one in manifest["spec"]["containers"] if "readinessProbe" in one}
        self._hosts = ""
        self.write_hosts([])
        threading.Thread(target=self._run, daemon=True).start()

    # -- from outside

    def write_hosts(self, services: list[str]) -> None:
        names = [
            form for name in services for form in (name, f"{name}.{self.namespace}", f"{name}.{self.namespace}.svc")
        ]
        hosts = f"127.0.0.1 localhost {self.name} {' '.join(names)}\n"
        if hosts != self._hosts:
            (self.folder / "hosts").write_text(hosts)  # in place: the containers have this file mounted
            self._hosts = hosts

    def terminate(self, grace: float) -> None:
        if self._deleted:
            return
        self._deleted = True

        def end() -> None:
            if not self._ended.wait(grace):
                self.kill()
            self._ended.wait()
            if not self.silent:
                self._kubelet._finalize(self.namespace, self.name)

        self._terminating.set()
        self.signal(signal.SIGTERM)
        threading.Thread(target=end, daemon=True).start()

    def kill(self) -> None:
        self._no_grace = True
        self._terminating.set()
        self.signal(signal.SIGKILL)

    def run_out_of_memory(self) -> None:
        """As the kernel ends a container that needs more memory than its limit."""
        self.out_of_memory = True
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send a signal to the container's first process. All others end with it."""
        if pids := self.pids():
            self.killed = self.killed or number == signal.SIGKILL
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[0], number)

    def pids(self) -> list[int]:
        """The container's processes, the first one first."""
        if self._process is None or self._process.poll() is not None:
            return []
        found: list[int] = []
        waiting = list(_children(self._process.pid))
        while waiting:
            found.append(waiting.pop(0))
            waiting += _children(found[-1])
        return found

    def log(self, container: str) -> Path:
        return self.folder / f"{container}.log"

    def inside(self, container: str) -> list[str]:
        """The words to put before a command to run it in the container."""
        [manifest] = [one for one in self.manifest["spec"]["containers"] if one["name"] == container]
        entered = ["nsenter", f"--target={self.pids()[0]}", "--mount", "--uts", "--pid", "--root"]
        variables = ["env", "-i", *(f"{name}={value}" for name, value in self._environment(manifest).items())]
        return [*entered, *self._become(manifest), *variables, *_in_folder(manifest)]

    def resize(self, rows: int, columns: int) -> None:
        if self._terminal is not None:
            termios.tcsetwinsize(self._terminal, (rows, columns))

    # -- the pod's life

    def _run(self) -> None:
        spec = self.manifest["spec"]
        try:
            volumes = self._volumes()
            self._report("Pending")
            codes = [0]
            for container in spec.get("initContainers", []):
                codes.append(self._container(container, volumes, "Pending"))
                if codes[-1]:
                    break
            else:
                for container in spec["containers"]:
                    codes.append(self._container(container, volumes, "Running"))
            self._report("Failed" if any(codes) else "Succeeded")
        except _Never as error:
            self._states[spec["containers"][0]["name"]] = {"waiting": {"reason": error.reason, "message": str(error)}}
            self._report("Pending")
            self._terminating.wait()
        shutil.rmtree(self.folder / "volumes", ignore_errors=True)
        self._ended.set()

    def _container(self, container: Manifest, volumes: dict[str, Path | int], phase: str) -> int:
        name = container["name"]
        if self._terminating.is_set():
            return 143
        while container["image"] not in self._kubelet._images:
            waiting = {"reason": "ImagePullBackOff", "message": f'Back-off pulling image "{container["image"]}"'}
            self._states[name] = {"waiting": waiting}
            self._report("Pending")
            if self._terminating.wait(0.5):
                raise _Never("ImagePullBackOff", waiting["message"])
        tty = container.get("tty", False)
        ours, theirs = os.openpty() if tty else os.pipe()
        # Signals that this process ignores, as one in a shell's background does, are not ignored in a container.
        apart = ["env", "--default-signal", "setsid", *["--ctty"] * tty]
        apart += ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child"]
        self._process = subprocess.Popen(
            [*apart, "bash", "-c", self._script(container, volumes)],
            stdin=theirs if tty else subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            env=self._environment(container),
        )
        os.close(theirs)
        if tty:
            self._terminal = ours
            threading.Thread(target=self._accept, daemon=True).start()
        writer = threading.Thread(target=self._write_log, args=(name, ours), daemon=True)
        writer.start()
        self._await_start(self._words(container))
        self._states[name] = {"running": {"startedAt": _now()}}
        self._report(phase)
        if name in self._unready:
            threading.Thread(target=self._probe, args=(container, phase), daemon=True).start()
        if self._terminating.is_set():
            self.signal(signal.SIGKILL if self._no_grace else signal.SIGTERM)
        code = self._process.wait()
        writer.join(10)
        if self.killed or code < 0:  # unshare 2.38 says 1 where its child was killed
            code = 128 + signal.SIGKILL
        reason = "Completed" if code == 0 else "OOMKilled" if self.out_of_memory else "Error"
        ended = {"exitCode": code, "reason": reason, "finishedAt": _now()}
        if message := (self.folder / "termination-log").read_text():
            ended["message"] = message
        self._states[name] = {"terminated": ended}
        return code

    def _probe(self, container: Manifest, phase: str) -> None:
        """Asks until there is an answer; then the container is ready."""
        probe = container["readinessProbe"]["httpGet"]
        port = next(one["containerPort"] for one in container["ports"] if one["name"] == probe["port"])
        ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        while not self._terminating.wait(POLL_SECONDS):
            with contextlib.suppress(OSError), ask(f"http://127.0.0.1:{port}{probe['path']}", timeout=5):
                self._unready.discard(container["name"])
                self._report(phase)
                return

    def _await_start(self, words: list[str]) -> None:
        """Wait until the container's first process has started. Before that it sees this machine's root."""
        assert self._process
        deadline = time.monotonic() + 5  # a script is its interpreter and does not show these words
        while self._process.poll() is None and time.monotonic() < deadline:
            for pid in self.pids()[:1]:
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1] == words:
                        return
            time.sleep(0.01)

    def _write_log(self, container: str, output: int) -> None:
        """As container runtimes do: each line after the moment it was written. To who is attached, all as it comes."""
        rest = b""
        with self.log(container).open("ab", buffering=0) as log:
            for piece in _pieces(output):
                for watcher in list(self._watchers):
                    with contextlib.suppress(OSError):
                        watcher.sendall(piece)
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    log.write(_stamped(line))
            if rest:
                log.write(_stamped(rest))
        self._terminal = None
        os.close(output)
        for watcher in list(self._watchers):
            with contextlib.suppress(OSError):  # it has gone
                watcher.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        """Who attaches to the terminal: what they type goes in, until they or the container go."""
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(f"\0{self.namespace}/{self.name}")
            door.listen()
            door.settimeout(POLL_SECONDS)
            while self._terminal is not None:
                with contextlib.suppress(TimeoutError):
                    watcher = door.accept()[0]
                    self._watchers.append(watcher)
                    threading.Thread(target=self._type, args=(watcher,), daemon=True).start()

    def _type(self, watcher: socket.socket) -> None:
        with watcher, contextlib.suppress(OSError):
            while (keys := watcher.recv(4096)) and self._terminal is not None:
                os.write(self._terminal, keys)
        self._watchers.remove(watcher)

    def _script(self, container: Manifest, volumes: dict[str, Path | int]) -> str:
        """Builds the container's root inside its namespaces and becomes its first process."""
        root, layer = self.folder / "root", self.folder / f"layer-{container['name']}"
        for path in (root, layer / "upper", layer / "work"):
            path.mkdir(parents=True, exist_ok=True)
        lines = [
            "set -e",
            f"mount -t overlay overlay -o lowerdir=/,upperdir={layer}/upper,workdir={layer}/work {root}",
            # This checkout and its Python may lie in somebody's home.
            f"chmod a+x {root}/root {root}/home 2>/dev/null || true",
            f"mkdir -p {root}/workspace && chown 10001:10001 {root}/workspace",
            *_devices(f"{root}/dev", self.folder / "termination-log"),
            f"mount -t proc proc {root}/proc && mount --rbind /sys {root}/sys",
            f"mount --bind {self.folder}/hosts {root}/etc/hosts",
            f"hostname {self.name[:63].rstrip('-.')}",
        ]
        for mount in container.get("volumeMounts", []):
            target, volume = f"{root}{os.path.realpath(mount['mountPath'])}", volumes[mount["name"]]
            lines.append(f"mkdir -p {target}")
            if isinstance(volume, int):
                lines.append(f"mount -t tmpfs -o size={volume},mode=1777 tmpfs {target}")
            else:
                source = volume / mount.get("subPath", "")
                lines.append(f"mkdir -p {source}; mount --bind {source} {target}")
            if mount.get("readOnly"):
                lines.append(f"mount -o remount,bind,ro {target}")
        for path in self._kubelet._content:  # a volume on /tmp would hide a checkout there
            lines.append(f"mkdir -p {root}{path} && mount --bind {path} {root}{path}")
        if self._security(container).get("readOnlyRootFilesystem"):
            lines.append(f"mount -o remount,ro {root}")
        entered = ["/usr/sbin/chroot", str(root), *self._become(container), *_in_folder(container)]
        started = [*entered, *self._words(container)]
        return "\n".join([*lines, f"exec {shlex.join(started)}"])

    def _words(self, container: Manifest) -> list[str]:
        """The command line of its first process."""
        words = container.get("command") or ["/usr/bin/tini", "--"]
        environment = self._environment(container)
        expanded = [_expand(word, environment) for word in (*words, *container.get("args", []))]
        # All pods share this machine's network: what is for the other pods is not for its neighbours.
        return ["--host=127.0.0.1" if word == "--host=0.0.0.0" else word for word in expanded]

    def _security(self, container: Manifest) -> Manifest:
        return dict(self.manifest["spec"].get("securityContext", {}) | container.get("securityContext", {}))

    def _become(self, container: Manifest) -> list[str]:
        context = self._security(container)
        user, group = context.get("runAsUser", 0), context.get("runAsGroup", 0)
        return ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs", "--"]

    def _environment(self, container: Manifest) -> dict[str, str]:
        host, _, port = self._kubelet.api_host.removeprefix("https://").partition(":")
        environment = {
            **self._kubelet._environment,
            "PYTHONUNBUFFERED": "1",
            "HOME": "/tmp",
            "KUBERNETES_SERVICE_HOST": host,
            "KUBERNETES_SERVICE_PORT": port,
        }
        meta, spec = self.manifest["metadata"], self.manifest["spec"]
        fields = {
            "status.podIP": "127.0.0.1",
            "status.hostIP": "127.0.0.1",
            "metadata.name": self.name,
            "metadata.namespace": self.namespace,
            "metadata.uid": self.uid,
            "spec.nodeName": self.node,
            "spec.serviceAccountName": spec.get("serviceAccountName", "default"),
        } | {f"metadata.labels['{key}']": value for key, value in meta.get("labels", {}).items()}
        for variable in container.get("env", []):
            if "value" in variable:
                environment[variable["name"]] = _expand(variable["value"], environment)
            elif "fieldRef" in variable.get("valueFrom", {}):
                environment[variable["name"]] = fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
            elif variable.get("valueFrom", {}).get("secretKeyRef", {}).get("optional"):
                continue  # there is none in the tests
            elif "valueFrom" in variable:
                raise _Never("CreateContainerConfigError", f"{variable['valueFrom']} is beyond this stand-in")
        return environment

    def _volumes(self) -> dict[str, Path | int]:
        """Volume name to the folder that holds it, or to the bytes of a memory volume."""
        found: dict[str, Path | int] = {}
        for volume in self.manifest["spec"].get("volumes", []):
            folder = self.folder / "volumes" / volume["name"]
            folder.mkdir(parents=True)
            folder.chmod(0o777)
            if "persistentVolumeClaim" in volume:
                claim = self._core.read_namespaced_persistent_volume_claim(
                    volume["persistentVolumeClaim"]["claimName"], self.namespace
                )
                bound = self._core.read_persistent_volume(claim.spec.volume_name)
                found[volume["name"]] = Path(bound.spec.host_path.path)
            elif volume.get("emptyDir", {}).get("medium") == "Memory":
                found[volume["name"]] = _bytes(volume["emptyDir"].get("sizeLimit", "1Gi"))
            elif "emptyDir" in volume:
                found[volume["name"]] = folder
            elif "secret" in volume:
                secret = self._core.read_namespaced_secret(volume["secret"]["secretName"], self.namespace)
                for key, value in (secret.data or {}).items():
                    (folder / key).write_bytes(base64.b64decode(value))
                found[volume["name"]] = folder
            elif "configMap" in volume:
                content = self._core.read_namespaced_config_map(volume["configMap"]["name"], self.namespace)
                for key, value in (content.data or {}).items():
                    (folder / key).write_text(value)
                found[volume["name"]] = folder
            else:
                raise _Never("CreateContainerConfigError", f"volume {volume['name']} is beyond this stand-in")
        return found

    def _report(self, phase: str) -> None:
        if self.silent:
            return
        spec = self.manifest["spec"]
        ready = phase == "Running" and not self._unready
        names = {"initContainerStatuses": spec.get("initContainers", []), "containerStatuses": spec["containers"]}
        statuses = {
            kind: [
                {
                    "name": container["name"],
                    "image": container["image"],
                    "imageID": container["image"],
                    "ready": ready,
                    "restartCount": 0,
                    "state": self._states.get(container["name"], {"waiting": {"reason": "PodInitializing"}}),
                }
                for container in containers
            ]
            for kind, containers in names.items()
        }
        conditions = [
            {
                "type": kind,
                "status": "True" if ready or kind == "PodScheduled" else "False",
                "lastTransitionTime": _now(),
            }
            for kind in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
        ]
        # Services refuse loopback addresses. Nobody sends anything to this one: names resolve to loopback.
        status = {"phase": phase, "podIP": "192.0.2.1", "hostIP": "127.0.0.1", "conditions": conditions, **statuses}
        if "startTime" not in self.manifest["status"]:
            self.manifest["status"]["startTime"] = status["startTime"] = _now()
        with contextlib.suppress(client.ApiException):
            self._core.patch_namespaced_pod_status(self.name, self.namespace, {"status": status})


class _Never(Exception):
    """A container that cannot be started."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            yield from (int(word) for word in (thread / "children").read_text().split())


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _ready() -> Manifest:
    return {
        "conditions": [
            {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "", "lastHeartbeatTime": _now()}
        ]
    }


def _bytes(quantity: str) -> int:
    units = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "M": 10**6, "G": 10**9}
    for unit, factor in units.items():
        if quantity.endswith(unit):
            return int(float(quantity.removesuffix(unit)) * factor)
    return int(quantity)


def _pieces(output: int) -> Iterator[bytes]:
    """The output of a pipe or terminal, until all writers have closed it."""
    with contextlib.suppress(OSError):  # a terminal ends with EIO
        while piece := os.read(output, 65536):
            yield piece


def _stamped(line: bytes) -> bytes:
    return datetime.datetime.now(datetime.UTC).strftime(MOMENT).encode() + b" " + line + b"\n"


def _devices(folder: str, last_word: Path) -> list[str]:
    """The container's own /dev, with the file for its termination message."""
    last_word.write_text("")
    last_word.chmod(0o666)
    lines = [f"mount -t tmpfs -o mode=755 tmpfs {folder} && mkdir {folder}/pts {folder}/shm"]
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        lines.append(f"touch {folder}/{name} && mount --bind /dev/{name} {folder}/{name}")
    lines += [f"mount --rbind /dev/pts {folder}/pts && ln -s pts/ptmx {folder}/ptmx && chmod 1777 {folder}/shm"]
    lines += [f"ln -s /proc/self/fd {folder}/fd", f"ln -s fd/0 {folder}/stdin", f"ln -s fd/1 {folder}/stdout"]
    lines += [f"ln -s fd/2 {folder}/stderr"]
    lines.append(f"touch {folder}/termination-log && mount --bind {last_word} {folder}/termination-log")
    return lines


def _in_folder(container: Manifest) -> list[str]:
    return ["sh", "-c", 'cd "$0"; exec "$@"', container.get("workingDir", "/workspace")]


def _expand(word: str, environment: dict[str, str]) -> str:
    for name, value in environment.items():
        word = word.replace(f"$({name})", value)
    return word


def _backend(kubelet: Kubelet) -> http.server.ThreadingHTTPServer:
    """What kubelet_server asks for.

    /containerLogs/NAMESPACE/POD/CONTAINER, and options, as the API server asks for `kubectl logs`;
    /command/NAMESPACE/POD/CONTAINER: the words in front of a command that is to run in there;
    /resize/NAMESPACE/POD/ROWS/COLUMNS: of the pod's terminal.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urllib.parse.urlparse(self.path)
            query = {name: values[0] for name, values in urllib.parse.parse_qs(url.query).items()}
            what, namespace, name, *rest = url.path.strip("/").split("/")
            pod = kubelet.pod(namespace, name)
            if what == "containerLogs" and pod and pod.log(rest[0]).exists():
                self._logs(pod, rest[0], query)
            elif what == "command" and pod and pod.pids():
                self._answer(json.dumps(pod.inside(rest[0])).encode())
            elif what == "resize" and pod:
                pod.resize(int(rest[0]), int(rest[1]))
                self._answer(b"")
            else:
                self.send_error(404)

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def _logs(self, pod: Pod, container: str, query: dict[str, str]) -> None:
            self._answer(b"")
            with contextlib.suppress(OSError), pod.log(container).open("rb") as log:
                lines = [line for line in log.read().splitlines(keepends=True) if self._wanted(line, query)]
                if "tailLines" in query:
                    lines = lines[len(lines) - min(len(lines), int(query["tailLines"])) :]
                self._send(lines, query)
                while query.get("follow") == "true" and not kubelet._stopped.is_set():
                    ended = not pod.pids()
                    self._send(log.readlines(), query)
                    if ended:
                        break
                    time.sleep(0.2)

        def _wanted(self, line: bytes, query: dict[str, str]) -> bool:
            return line.split(b" ", 1)[0].decode() >= query.get("sinceTime", "")

        def _send(self, lines: list[bytes], query: dict[str, str]) -> None:
            bare = query.get("timestamps") != "true"
            self.wfile.write(b"".join(line.split(b" ", 1)[1] if bare else line for line in lines))
            self.wfile.flush()

        def log_message(self, *_: object) -> None:
            pass

    return http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
