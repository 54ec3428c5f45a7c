"""The image in containers as Kubernetes runs them: user 10001, no rights, no network, a read-only root file system.

    ELASTIC_GPT_IMAGE=elastic-gpt:0.1.0-cpu pytest tests/image

tests an image that podman has; `make test-image` builds one first.
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import events, metrics

if "ELASTIC_GPT_IMAGE" not in os.environ:
    pytest.skip("ELASTIC_GPT_IMAGE names no image; `make test-image` builds one", allow_module_level=True)

IMAGE = os.environ["ELASTIC_GPT_IMAGE"]
REPO = Path(__file__).parents[2]
# nofile and nproc: podman's own are more than root may set in a container or a small VM; there crun fails as well.
PODMAN = ["--runtime=runc", "--ulimit=nofile=1024:4096", "--ulimit=nproc=4096:4096", "--env=OMP_NUM_THREADS=1"]
LOCKED = [
    *("--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp:rw,exec,mode=1777"),
    *("--cap-drop=all", "--security-opt=no-new-privileges"),
]
TRAIN = ["train", "debug_cpu", "--data.dir=data", "--elastic.exact", "--observe.tensorboard=false"]


def podman(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["podman", *words], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def inside(*arguments: str, options: tuple[str, ...] = (), code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `arguments` in a container to their end."""
    return podman("run", "--rm", *PODMAN, *LOCKED, "--network=none", *options, IMAGE, *arguments, code=code)


def text(process: subprocess.CompletedProcess[str]) -> str:
    return process.stdout.strip()


def until(condition: Callable[[], bool], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The volume, with data that the image has prepared."""
    folder = tmp_path_factory.mktemp("workspace")
    os.chown(folder, 10001, 10001)  # what fsGroup does in a pod
    folder.chmod(0o755)
    inside("elastic-gpt", "prepare", "--sample", "--tokenizer=char", "--output-dir=data", options=on(folder))
    return folder


def on(workspace: Path) -> tuple[str, ...]:
    return (f"--volume={workspace}:/workspace",)


@pytest.fixture
def containers() -> Iterator[Callable[..., str]]:
    """Starts a container in the background and returns its name; what is left of them goes with the test."""
    names: list[str] = []

    def start(*arguments: str, name: str, options: tuple[str, ...]) -> str:
        names.append(f"elastic-gpt-{os.getpid()}-{name}")
        podman("run", "--detach", f"--name={names[-1]}", *PODMAN, *LOCKED, *options, IMAGE, *arguments)
        return names[-1]

    yield start
    for name in reversed(names):
        podman("rm", "--force", "--time=0", name)


def stopped(name: str) -> tuple[int, float]:
    """SIGTERM to a container's PID 1 with Kubernetes' 30 s of grace; returns its exit code and the seconds that it took."""
    start = time.monotonic()
    podman("stop", "--time=30", name)
    return int(text(podman("wait", name))), time.monotonic() - start


def test_pid_1_is_tini_and_the_user_is_the_manifests() -> None:
    assert text(inside("sh", "-c", "cat /proc/1/comm; id -u; id -g; pwd")).split() == [
        "tini",
        "10001",
        "10001",
        "/workspace",
    ]


def test_a_user_s_mistake_is_one_line_and_exit_code_2() -> None:
    done = inside("elastic-gpt", "train", "debug_cpu", "--stepz=2", code=2)
    assert "stepz" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_user_may_write_to_the_workspace_and_tmp_alone_even_without_a_read_only_root() -> None:
    places = "find / -xdev -writable ! -type l ! -path '/proc/*' ! -path '/dev/*' ! -path '/sys/*'"
    done = podman("run", "--rm", *PODMAN, "--network=none", IMAGE, "sh", "-c", f"{places} 2>/dev/null; true")
    assert set(text(done).split()) <= {"/tmp", "/var/tmp", "/run/lock", "/workspace", "/dev", "/proc"}


def test_no_data_no_sources_and_no_password_are_baked_in() -> None:
    left_over = "find /workspace /tmp /src /package -mindepth 1"
    kinds = " -o ".join(f"-name '*.{kind}'" for kind in ("bin", "safetensors", "jsonl", "txt", "parquet"))
    data = rf"find /opt /home /srv /mnt -size +64k \( {kinds} \)"
    assert text(inside("sh", "-c", f"({left_over}; {data}) 2>/dev/null; true")) == ""
    assert "INDEX_URL" not in podman("history", "--no-trunc", "--format={{.CreatedBy}}", IMAGE).stdout


def test_every_package_is_a_pinned_one_and_they_fit_together() -> None:
    tell = "print(json.dumps({package.name: package.version for package in distributions()}))"
    code = f"import json; from importlib.metadata import distributions; {tell}"
    installed = json.loads(text(inside("python", "-c", code)))
    del installed["elastic-gpt"]
    pins = {
        plain(name): version
        for file in ("constraints.txt", "docker/cuda-constraints.txt")
        for name, version in re.findall(r"^([\w.-]+)==(.+)$", (REPO / file).read_text(), re.M)
    }
    found = {plain(name): version.partition("+")[0] for name, version in installed.items()}
    assert found == {name: pins.get(name) for name in found}
    base = "import sys; print(sys._base_executable)"
    inside("sh", "-c", f'$(python -c "{base}") -m pip --python /opt/venv/bin/python3 check')


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_nothing_is_compiled_at_the_start_of_a_process() -> None:
    """On a read-only file system it would be compiled anew at each start, for 6 s."""
    modules = (
        "torch._dynamo, torch.utils.tensorboard, dlrover.trainer.torch.elastic_run, s3fs, elastic_gpt.nodes.launch"
    )
    said = inside("python", "-v", "-c", f"import {modules}, model_zoo.nanogpt.train").stderr
    assert len(re.findall(r"^# code object from '.*\.pyc'$", said, re.M)) > 1000
    assert re.findall(r"^# code object from '?/.*\.py'?$", said, re.M) == []


def test_the_cpu_variant_stays_small() -> None:
    if "+cpu" not in text(inside("python", "-c", "import torch; print(torch.__version__)")):
        pytest.skip("not the CPU variant")
    kilobytes = int(text(inside("du", "-skx", "/opt/venv")).split()[0])
    assert kilobytes < 1_000_000  # 933 MiB in November 2026, 561 of them torch's


def test_two_steps_then_text(workspace: Path) -> None:
    inside("elastic-gpt", *TRAIN, "--steps=2", "--run-dir=two", options=on(workspace))
    assert [line["step"] for line in metrics(workspace / "two")] == [1, 2]
    assert len(inside("elastic-gpt", "generate", "two", "--prompt=The ", options=on(workspace)).stdout) > 20


def test_dlrover_runs_two_nodes_in_one_container_with_the_same_losses(workspace: Path) -> None:
    inside("elastic-gpt", *TRAIN, "--steps=4", "--run-dir=alone", options=on(workspace))
    done = inside(
        "elastic-gpt", "launch", "--nodes=2", "--", *TRAIN, "--steps=4", "--run-dir=pair", options=on(workspace)
    )
    assert "2 workers" in done.stdout
    assert [line["loss"] for line in metrics(workspace / "pair")] == [
        line["loss"] for line in metrics(workspace / "alone")
    ]


def test_a_user_id_that_the_image_does_not_know(workspace: Path) -> None:
    """OpenShift gives each namespace a user id of its own, with group 0."""
    options = (*on(workspace), "--user=1000650000:0", "--passwd=false")  # podman would make it known
    assert "step 1/1 " in inside("elastic-gpt", *TRAIN, "--steps=1", "--run-dir=/tmp/run", options=options).stdout
    code = "import os, getpass, torch._inductor.codecache as c; print(os.getuid(), getpass.getuser(), c.cache_dir())"
    uid, *words = inside("python", "-c", code, options=options).stdout.split()
    assert (uid, len(words)) == ("1000650000", 2)


def test_sigterm_reaches_training_through_pid_1_and_the_state_is_saved(
    workspace: Path, containers: Callable[..., str]
) -> None:
    run = workspace / "term"
    name = containers(
        "elastic-gpt",
        *TRAIN,
        "--steps=100000",
        "--run-dir=term",
        name="train",
        options=(*on(workspace), "--network=none"),
    )
    until(lambda: len(metrics(run)) >= 3)
    code, seconds = stopped(name)
    assert (code, seconds < 30) == (143, True)  # nobody restarts it here, so the exit code is the signal's
    steps = [line["step"] for line in metrics(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert events(run, "saved")[-1]["step"] == steps[-1]


def test_pods_leave_with_0_at_sigterm_and_what_they_did_is_saved(
    workspace: Path, containers: Callable[..., str]
) -> None:
    """The job's own pods: a master and two workers, which share a network and the volume, and nothing else."""
    run = workspace / "pods"
    start_master = ["python", "-m", "dlrover.python.master.main", "--platform=local", "--port=50001", "--node_num=2"]
    master = containers(*start_master, "--job_name=pods", name="master", options=("--network=none",))

    def worker(number: int) -> str:
        environment = {"DLROVER_MASTER_ADDR": "127.0.0.1:50001", "NODE_TYPE": "worker", "POD_IP": "127.0.0.1"}
        environment |= {name: str(number) for name in ("NODE_RANK", "NODE_ID")} | {"NODE_NUM": "2", "WORKER_NUM": "2"}
        environment |= {"POD_NAME": f"pods-worker-{number}", "ELASTIC_JOB_NAME": "pods", "GLOO_SOCKET_IFNAME": "lo"}
        options = (
            *on(workspace),
            f"--network=container:{master}",
            *(f"--env={key}={value}" for key, value in environment.items()),
        )
        launch = ["elastic-gpt", "launch", "--nnodes=1:2", "--", *TRAIN, "--steps=100000", "--run-dir=pods"]
        return containers(*launch, name=f"worker-{number}", options=options)

    workers = [worker(0), worker(1)]
    until(lambda: any(line["world_size"] == 2 for line in metrics(run)))
    code, seconds = stopped(workers[0])
    assert (code, seconds < 30) == (0, True)
    alone_from = len(metrics(run))
    until(lambda: len(metrics(run)) > alone_from + 3)
    code, seconds = stopped(workers[1])
    assert (code, seconds < 30) == (0, True)

    steps = [line["step"] for line in metrics(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert events(run, "saved")[-1]["step"] == steps[-1]
    assert [event["node"] for event in events(run, "left")] == ["pods-worker-0", "pods-worker-1"]


def test_the_same_image_serves_the_model_from_a_volume_that_it_cannot_write(
    workspace: Path, containers: Callable[..., str]
) -> None:
    inside("elastic-gpt", *TRAIN, "--steps=2", "--run-dir=served", options=on(workspace))
    mount = f"--volume={workspace}:/workspace:ro"
    name = containers("elastic-gpt", "serve", "served", name="serve", options=(mount, "--network=none"))
    ask = (
        "import json, urllib.request as u; wanted = {'model': 'served', 'prompt': 'The ', 'max_tokens': 5};"
        " request = u.Request('http://127.0.0.1:8080/v1/completions', json.dumps(wanted).encode(),"
        " {'Content-Type': 'application/json'}); print(json.load(u.urlopen(request))['usage']['completion_tokens']);"
        " print(u.urlopen('http://127.0.0.1:8080/page/page.js').status)"
    )
    until(lambda: "serving served" in podman("logs", name).stderr)
    assert podman("exec", name, "python", "-c", ask).stdout.split() == ["5", "200"]
    code, seconds = stopped(name)
    assert (code, seconds < 30) == (143, True)
