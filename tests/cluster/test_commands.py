"""The commands of the runbook, as a person types them."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
import yaml

from tests.cluster.conftest import HERE, IMAGE, SHORT, TRAINING, Job
from tests.conftest import PATIENCE, events, metrics

Make = Callable[..., Job]
EXAMPLES = HERE.parents[1] / "examples" / "elasticjob"
PROMPT = "GPT prompt > "


def submit(job: Job, *words: object, steps: int = SHORT, code: int = 0) -> str:
    spec = f"--image {IMAGE} --gpus 0 --cpus 1 --memory 4 --tokenizer char --env OMP_NUM_THREADS=1".split()
    return job.command("submit", job.spec.name, *spec, *words, "--", *TRAINING, f"--steps={steps}", code=code)


def test_a_job_goes_from_submit_to_delete(make_job: Make, tmp_path: Path) -> None:
    job, text = make_job(), tmp_path / "data.txt"
    name = job.spec.name
    text.write_text(Path(os.__file__).read_text())

    # The server checks what it can, and keeps nothing.
    assert "kubectl create namespace" in submit(job, "--text", text, "--dry-run=server", code=2)
    job.cluster.kubectl("create", "namespace", job.spec.namespace)
    assert f"elasticjob/{name} created (dry run)" in submit(job, "--text", text, "--dry-run=server")
    assert "no jobs" in job.command("list")

    assert f"elasticjob/{name} created" in submit(job, "--text", text)
    assert f"elasticjob/{name} unchanged" in submit(job, "--text", text)
    assert "with other settings" in submit(job, "--text", text, steps=SHORT + 1, code=2)

    # Live and line by line at the same time.
    live = job.terminal("watch", name)
    lines = job.command("watch", name).splitlines()
    assert any(line.startswith("step ") for line in lines)
    assert lines[-1] == "Succeeded"
    assert live.end() == 0
    for what in (f"{name}-edljob-worker-0", "tokens/s", "Scheduled", "Succeeded"):
        assert what in live.seen
    job.command("wait", name)
    assert "Succeeded" in job.command("list", "-A")
    assert f"step {SHORT}/{SHORT}" in job.command("status", name)
    assert "prepare | " in job.command("logs", name, "--of", "prepare")
    assert "master-0 | " in job.command("logs", name, "--of", "master", "--tail", 3)

    talk(job)
    talk(job, PATH="/nowhere")  # without kubectl

    # Deleted and submitted again, it goes on where it was.
    assert "volume elastic-gpt stays" in job.command("delete", name)
    job.wait("no pods", lambda: not job.pods() and not job.pods("dlrover-master"), gone=True)
    submit(job, "--text", text, steps=SHORT + 50)
    job.command("wait", name)
    assert len(metrics(job.run)) == SHORT + 50
    assert {event["dropped"] for event in events(job.run, "restored")} == {0}

    claims = lambda: job.cluster.kubectl("get", "pvc", "-n", job.spec.namespace)  # noqa: E731
    assert "elastic-gpt" in claims()
    assert "persistentvolumeclaim/elastic-gpt deleted" in job.command("delete", name, "--volume")
    job.wait("no claim", lambda: "elastic-gpt" not in claims(), gone=True)


def talk(job: Job, **more: str) -> None:
    """Ask the model twice in `job prompt`, once with Ctrl-C in the middle of the reply."""
    terminal = job.terminal("prompt", job.spec.name, **more)
    terminal.expect(PROMPT)
    terminal.type("import \r")
    terminal.expect("import \r\n")
    terminal.expect(PROMPT)
    assert len(terminal.seen.rpartition("import \r\n")[2]) > 100, terminal.seen
    terminal.type("def \r")
    terminal.expect("def \r\n.")  # the reply has begun
    terminal.type("\x03")
    terminal.expect(PROMPT)
    terminal.type("exit\r" if more else "\x04")
    assert terminal.end() == 0
    pods = lambda: job.cluster.kubectl("get", "pods", "-n", job.spec.namespace)  # noqa: E731
    job.wait("no prompt pod", lambda: f"{job.spec.name}-prompt" not in pods())


def test_a_model_is_served_while_its_run_goes_on_and_the_server_follows(make_job: Make, tmp_path: Path) -> None:
    job, text = make_job(), tmp_path / "data.txt"
    text.write_text(Path(os.__file__).read_text())
    name, ask = job.spec.name, httpx2.Client(base_url="http://127.0.0.1:8080", timeout=PATIENCE, trust_env=False)
    submit(job, "--text", text, steps=100_000)
    job.wait("a first world", lambda: metrics(job.run))
    told = job.command("serve", name)  # before the first checkpoint is there, which it waits for
    assert f"deployment/{name}-serve created" in told
    assert f"port-forward service/{name}-serve 8080:80" in told

    def step() -> int:
        return int(ask.get("/ready").json()["step"])

    first = step()
    wanted = {"model": name, "prompt": "import ", "max_tokens": 5}
    answer = ask.post("/v1/completions", json=wanted)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 5
    job.wait("a newer step", lambda: step() > first)
    endpoints = job.cluster.kubectl("-n", job.spec.namespace, "get", "endpoints", f"{name}-serve")
    assert ":8080" in endpoints
    assert f"service/{name}-serve configured" in job.command("serve", name)
    assert f"deployment/{name}-serve deleted" in job.command("delete", name)
    pods = lambda: job.cluster.kubectl("get", "pods", "-n", job.spec.namespace)  # noqa: E731
    job.wait("no server", lambda: f"{name}-serve" not in pods(), gone=True)


def test_a_text_on_the_volume_and_a_look_at_the_ledger(make_job: Make, tmp_path: Path) -> None:
    job, text = make_job(), tmp_path / "data.txt"
    text.write_text(Path(os.__file__).read_text())
    shell = f"{job.spec.name}-shell"
    kubectl = lambda *words: job.cluster.kubectl("-n", job.spec.namespace, *words)  # noqa: E731
    with contextlib.suppress(
        AssertionError
    ):  # a new namespace has no service account for a moment, and refuses the pod
        job.apply(("namespace", "volume", "shell"))
    job.wait("the service account", lambda: "default" in kubectl("get", "serviceaccounts"), gone=True)
    job.apply(("namespace", "volume", "shell"))
    kubectl("wait", "--for=condition=Ready", f"--timeout={PATIENCE:.0f}s", f"pod/{shell}")
    kubectl("cp", text, f"{shell}:/workspace/data.txt")
    submit(job, "--text", "/workspace/data.txt")
    job.command("wait", job.spec.name)
    assert f"{SHORT} steps kept" in kubectl(
        "exec", shell, "--", "elastic-gpt", "ledger", f"/workspace/{job.spec.name}/run"
    )
    with pytest.raises(AssertionError, match="exit code 2"):
        kubectl("exec", shell, "--", "elastic-gpt", "leger")
    kubectl("delete", "pod", shell)


def test_the_example_for_cpus_by_kubectl_alone(make_job: Make, tmp_path: Path) -> None:
    job = make_job(namespace="training", name="elastic-gpt-cpu", volume="elastic-gpt-cpu")
    kustomization = {
        "resources": [os.path.relpath(EXAMPLES / "cpu", tmp_path)],
        "images": [{"name": "elastic-gpt", "newName": IMAGE.partition(":")[0], "newTag": IMAGE.partition(":")[2]}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    kubectl = lambda *words: job.cluster.kubectl("-n", job.spec.namespace, *words)  # noqa: E731
    kubectl("apply", "-k", tmp_path)
    job.finish()
    assert len(metrics(job.run)) == 100
    assert "Succeeded" in kubectl("get", "elasticjob", "elastic-gpt-cpu")
    kubectl("delete", "-k", tmp_path)
