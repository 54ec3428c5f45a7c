"""A cluster for the tests: Kubernetes' own control plane, DLRover's own master and agents; pods and operator are stand-ins.

make test-cluster builds what it needs once (about 6 minutes) and keeps it in ~/.cache/elastic-gpt. Needs Debian 12, root, and
kubectl, tini and util-linux (`apt-get install kubernetes-client tini util-linux`); elsewhere the tests are skipped with the
reason. `ELASTICJOB_OPERATOR=/path/to/manager make test-cluster` runs DLRover's own operator in place of the stand-in.
"""

import codecs
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, config

from elastic_gpt.jobs.manifest import manifests
from elastic_gpt.jobs.spec import JobSpec
from tests.cluster.control_plane import ControlPlane
from tests.cluster.elasticjob_operator import operator
from tests.cluster.kubelet import Kubelet
from tests.conftest import PATIENCE, elastic_gpt, environment, events, metrics

HERE = Path(__file__).parent
CRD = HERE / "elasticjob-crd.yaml"
TOOLS = ("kubectl", "tini", "unshare", "nsenter", "setpriv")  # beside the programs that build-control-plane installs
IMAGE = "elastic-gpt:test"
NODES = {f"machine-{number}": {"cpu": "2", "memory": "8Gi"} for number in range(4)}
LONG, SHORT = 1500, 150  # steps of a job to which things happen, and of one that has to finish
TRAINING = [
    *("--global-batch=32", "--micro-batch=4", "--model.block-size=64", "--model.n-layer=2", "--model.n-embd=64"),
    *("--device=cpu", "--elastic.exact", "--model.dropout=0.1", "--observe.tensorboard=false"),
    *("--checkpoint.interval=50", "--evaluate.interval=1000"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE) and "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(900))


class Cluster:
    """The cluster: what tests do to it, and what they see."""

    def __init__(self, kubeconfig: Path, kubelet: Kubelet, volumes: Path) -> None:
        self.kubeconfig, self.kubelet, self._volumes = kubeconfig, kubelet, volumes
        self.operator = operator(kubeconfig)
        self.api = config.new_client_from_config(str(kubeconfig))
        self.core = client.CoreV1Api(self.api)
        self.custom = client.CustomObjectsApi(self.api)

    def kubectl(self, *words: object, text: str | None = None) -> str:
        command = ["kubectl", "--kubeconfig", str(self.kubeconfig), *map(str, words)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def volume(self, namespace: str, claim: str = "elastic-gpt") -> Path:
        """Make a volume for the claim, as an administrator or a storage class does. Returns its folder here."""
        folder = self._volumes / namespace
        folder.mkdir(parents=True)
        folder.chmod(0o777)
        self.core.create_persistent_volume(
            {
                "metadata": {"name": f"{namespace}-{claim}"},
                "spec": {
                    "capacity": {"storage": "20Gi"},
                    "accessModes": ["ReadWriteMany", "ReadWriteOnce"],
                    "hostPath": {"path": str(folder)},
                    "claimRef": {"namespace": namespace, "name": claim},
                },
            }
        )
        return folder


class Job:
    """An ElasticJob in a namespace of its own, and its volume."""

    def __init__(self, cluster: Cluster, spec: JobSpec, folder: Path, steps: int, without: tuple[str, ...]) -> None:
        self.cluster, self.spec, self.steps, self.without = cluster, spec, steps, without
        self.run = folder / spec.name / "run"

    def submit(self) -> None:
        """kubectl apply of what `elastic-gpt job render` prints."""
        parts = ("namespace", "volume", "rbac", "prepare", "job")
        self.apply(tuple(part for part in parts if part not in self.without))

    def apply(self, parts: tuple[str, ...]) -> None:
        self.cluster.kubectl("apply", "-f", "-", text=yaml.safe_dump_all(manifests(self.spec, parts)))

    def words(self, action: str, *words: object) -> list[str]:
        """The command line of `elastic-gpt job ...`."""
        job = [sys.executable, "-m", "elastic_gpt.cli", "job", action, "--namespace", self.spec.namespace]
        return [*job, *map(str, words)]

    def command(self, *words: Any, code: int | None = 0) -> str:
        """`elastic-gpt job ...` as a person runs it; returns all that it printed."""
        done = subprocess.run(
            self.words(*words),
            capture_output=True,
            text=True,
            env=environment(KUBECONFIG=str(self.cluster.kubeconfig)),
            timeout=2 * PATIENCE,
            check=False,
        )
        said = done.stdout + done.stderr
        assert code in (None, done.returncode), f"{words}: exit code {done.returncode}\n{said}\n{self.story()}"
        return said

    def terminal(self, *words: Any, **more: str) -> "Terminal":
        """`elastic-gpt job ...` in a terminal."""
        return Terminal(self.words(*words), environment(KUBECONFIG=str(self.cluster.kubeconfig), TERM="xterm", **more))

    def patch(self, change: dict[str, Any]) -> None:
        words = [
            "patch",
            "elasticjob",
            self.spec.name,
            "-n",
            self.spec.namespace,
            "--type=merge",
            "-p",
            json.dumps(change),
        ]
        self.cluster.kubectl(*words)

    def phase(self) -> str:
        job = self.cluster.custom.get_namespaced_custom_object(
            "elastic.iml.github.io", "v1alpha1", self.spec.namespace, "elasticjobs", self.spec.name
        )
        return str(job.get("status", {}).get("phase", ""))

    def pods(self, kind: str = "worker") -> dict[str, Any]:
        """Name to pod, for all pods that are not being deleted."""
        label = f"elasticjob.dlrover/name={self.spec.name},elasticjob.dlrover/replica-type={kind}"
        pods = self.cluster.core.list_namespaced_pod(self.spec.namespace, label_selector=label).items
        return {pod.metadata.name: pod for pod in pods if pod.metadata.deletion_timestamp is None}

    def running(self) -> list[str]:
        return sorted(name for name, pod in self.pods().items() if pod.status.phase == "Running")

    def pod(self, name: str) -> Any:
        found = self.cluster.kubelet.pod(self.spec.namespace, name)
        assert found, f"no pod {name}"
        return found

    def master(self) -> str:
        """The master that runs, or None."""
        return next((name for name, pod in self.pods("dlrover-master").items() if pod.status.phase == "Running"), "")

    def lose_master(self, lose: Callable[[str], object]) -> None:
        """Kill the master, and wait until a new one has read the job. The operator may call it Failed meanwhile."""
        lost = self.master()
        lose(lost)
        self.wait("another master", lambda: self.master() not in ("", lost), gone=True)
        log = self.pod(self.master()).log("main")
        looked = (
            "the job asks for",
            "elasticJob which is suspended",
        )  # our message, and that of DLRover for a suspended job
        self.wait("its first look", lambda: any(words in log.read_text() for words in looked), gone=True)
        self.wait("a phase that is right", lambda: self.phase() in ("Running", "Suspended"), gone=True)

    def kill(self, pod: str) -> None:
        self.pod(pod).signal(signal.SIGKILL)

    def delete_pod(self, pod: str, *words: str) -> None:
        self.cluster.kubectl("delete", "pod", "-n", self.spec.namespace, pod, "--wait=false", *words)

    def step(self) -> int:
        return metrics(self.run)[-1]["step"] if metrics(self.run) else 0

    def world(self) -> int:
        """Number of workers in the newest step."""
        return metrics(self.run)[-1]["world_size"] if metrics(self.run) else 0

    def wait(self, what: str, holds: Callable[[], bool], gone: bool = False) -> None:
        """Wait until `holds`. `gone`: the job may be deleted or called Failed meanwhile."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(client.ApiException):
                if holds():
                    return
                assert gone or self.phase() != "Failed", self.story()
            time.sleep(0.2)
        raise AssertionError(f"{what}: not within {PATIENCE:.0f} s\n{self.story()}")

    def wait_world(self, size: int) -> None:
        self.wait(f"a world of {size}", lambda: self.world() == size)

    def wait_life(self) -> None:
        """Wait until a new world has done its first step."""
        lives = len(events(self.run, "recovered"))
        self.wait("a new world", lambda: len(events(self.run, "recovered")) > lives)

    def wait_steps(self, more: int) -> None:
        goal = self.step() + more
        self.wait(f"step {goal}", lambda: self.step() >= goal)

    def finish(self) -> None:
        self.wait("Succeeded", lambda: self.phase() == "Succeeded")

    def story(self) -> str:
        """For a failed test: the pods, and the end of each log."""
        lines = [
            f"phase {self.phase()}, step {self.step()}",
            self.cluster.kubectl("get", "pods,jobs,pvc", "-n", self.spec.namespace),
        ]
        folders = self.cluster.kubelet._folder.glob(f"pods/*{self.spec.name}*")
        for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime)[-6:]:
            for log in folder.glob("*.log"):
                lines += [f"--- {folder.name} {log.name}", "\n".join(log.read_text().splitlines()[-25:])]
        return "\n".join(lines)

    def delete(self) -> None:
        with contextlib.suppress(client.ApiException):
            self.cluster.core.delete_namespace(self.spec.namespace)
        self.cluster.core.delete_persistent_volume(f"{self.spec.namespace}-{self.spec.volume}")
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.cluster.core.list_namespaced_pod(self.spec.namespace).items:
            time.sleep(0.2)


class Terminal:
    """A command in its own terminal: what a person sees, and what they type."""

    def __init__(self, words: list[str], variables: dict[str, str]) -> None:
        self.seen = ""
        self._read = 0  # what `expect` has read
        self._screen, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (40, 120))
        self._process = subprocess.Popen(
            words, stdin=theirs, stdout=theirs, stderr=theirs, env=variables, start_new_session=True
        )
        os.close(theirs)
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with contextlib.suppress(OSError):  # EIO: the command has ended
            while piece := os.read(self._screen, 65536):
                self.seen += decoder.decode(piece)

    def expect(self, pattern: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not (match := re.compile(pattern, re.DOTALL).search(self.seen, self._read)):
            assert time.monotonic() < deadline, f"no '{pattern}' within {PATIENCE:.0f} s:\n{self.seen}"
            time.sleep(0.05)
        self._read = match.end()

    def type(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def end(self) -> int:
        """Wait for the command's end; returns its exit code."""
        code = self._process.wait(PATIENCE)
        self._thread.join(10)
        os.close(self._screen)
        return code


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := [program for program in TOOLS if not shutil.which(program)]:  # say so before building for minutes
        pytest.skip(f"no cluster here: {', '.join(missing)} not installed (see tests/cluster/conftest.py)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elastic-gpt" / "kubernetes-1.20"
    built = subprocess.run([HERE / "build-control-plane", cache], stderr=subprocess.PIPE, text=True, check=False)
    if built.returncode == 3:
        pytest.skip(built.stderr.strip().splitlines()[-1])
    assert built.returncode == 0, built.stderr
    folder = tmp_path_factory.mktemp("cluster")
    # Pods run as another user, who needs access to their volumes.
    for path in (folder, *folder.parents[:2]):
        path.chmod(0o755)
    variables = {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),  # whose code the tests run
    }
    with ControlPlane(cache, folder) as plane, contextlib.ExitStack() as stack:
        api = config.new_client_from_config(str(plane.kubeconfig))
        content = [HERE.parents[1], Path(sys.prefix)]
        kubelet = Kubelet(
            api,
            folder,
            nodes=NODES,
            images={IMAGE},
            content=content,
            environment=variables,
            server=cache / "kubelet_server",
        )
        stack.callback(kubelet.close)
        made = Cluster(plane.kubeconfig, kubelet, folder / "volumes")
        made.kubectl("apply", "-f", CRD)
        for _ in range(100):  # until the API server serves them
            with contextlib.suppress(client.ApiException):
                made.custom.list_cluster_custom_object("elastic.iml.github.io", "v1alpha1", "elasticjobs")
                break
            time.sleep(0.2)
        made.operator.start()
        stack.callback(made.operator.stop)
        yield made


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Job], Path]:
    """Gives the run directory of an undisturbed run in one process with the settings of a job."""
    folder = tmp_path_factory.mktemp("undisturbed")
    elastic_gpt("prepare", "--sample", "--tokenizer", "char", "--output-dir", folder / "data")
    for steps in (LONG, SHORT):  # before any job: both cores are busy with those
        paths = [f"--data.dir={folder / 'data'}", f"--run-dir={folder / str(steps)}"]
        elastic_gpt("train", "debug_cpu", *TRAINING, f"--steps={steps}", *paths)
    return lambda job: folder / str(job.steps)


@pytest.fixture
def make_job(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Callable[..., Job]]:
    """make_job(steps=..., **fields of JobSpec): a job that is not yet submitted, with a volume for it."""
    made: list[Job] = []

    def make(*, steps: int = LONG, without: tuple[str, ...] = (), **fields: Any) -> Job:
        # Each job has another name, since DLRover's operator knows jobs only by their names.
        name = request.node.name.removeprefix("test_").replace("_", "-")[:30].strip("-")
        spec = JobSpec(
            **{
                "namespace": f"{name}-{len(made)}",
                "name": f"{name}-{len(made)}",
                "image": IMAGE,
                "gpus": 0,
                "cpus": 1,
                "memory": 4,
                "env": (("OMP_NUM_THREADS", "1"),),
                "tokenizer": "char",
                "arguments": (*TRAINING, f"--steps={steps}"),
            }
            | fields
        )
        made.append(Job(cluster, spec, cluster.volume(spec.namespace, spec.volume), steps, without))
        return made[-1]

    yield make
    for job in made:
        job.delete()
