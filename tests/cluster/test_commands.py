"""The commands of the runbook, as a person types them."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

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


def test_from_submit_to_delete(make_job: Make, tmp_path: Path) -> None:
    job, text = make_job(), tmp_path / "data.txt"
    text.write_text(Path(os.__file__).read_text())

    # The server checks what it can, and keeps nothing.
    assert "kubectl create namespace" in submit(job, "--text", text, "--dry-run=server", code=2)
    job.cluster.kubectl("create", "namespace", job.spec.namespace)
    assert "elasticjob/gpt created (dry run)" in submit(job, "--text", text, "--dry-run=server")
    assert "no jobs" in job.command("list")

    assert "elasticjob/gpt created" in submit(job, "--text", text)
    assert "elasticjob/gpt unchanged" in submit(job, "--text", text)
    assert "with other settings" in submit(job, "--text", text, steps=SHORT + 1, code=2)

    # Live and line by line at the same time.
    live = job.terminal("watch", "gpt")
    lines = job.command("watch", "gpt").splitlines()
    assert any(line.startswith("step ") for line in lines)
    assert lines[-1] == "Succeeded"
    assert live.end() == 0
    for what in ("gpt-edljob-worker-0", "tokens/s", "Scheduled", "Succeeded"):
        assert what in live.seen
    job.command("wait", "gpt")
    assert "Succeeded" in job.command("list", "-A")
    assert f"step {SHORT}/{SHORT}" in job.command("status", "gpt")
    assert "prepare | " in job.command("logs", "gpt", "--of", "prepare")
    assert "master-0 | " in job.command("logs", "gpt", "--of", "master", "--tail", 3)

    talk(job)
    talk(job, PATH="/nowhere")  # without kubectl

    # Deleted and submitted again, it goes on where it was.
    assert "volume elastic-gpt stays" in job.command("delete", "gpt")
    job.wait("no pods", lambda: not job.pods() and not job.pods("dlrover-master"), gone=True)
    submit(job, "--text", text, steps=SHORT + 50)
    job.command("wait", "gpt")
    assert len(metrics(job.run)) == SHORT + 50
    assert [event["dropped"] for event in events(job.run, "restored")] == [0, 0]

    claims = lambda: job.cluster.kubectl("get", "pvc", "-n", job.spec.namespace)  # noqa: E731
    assert "elastic-gpt" in claims()
    assert "persistentvolumeclaim/elastic-gpt deleted" in job.command("delete", "gpt", "--volume")
    job.wait("no claim", lambda: "elastic-gpt" not in claims(), gone=True)


def talk(job: Job, **more: str) -> None:
    """Ask the model twice in `job prompt`, once with Ctrl-C in the middle of the reply."""
    terminal = job.terminal("prompt", "gpt", **more)
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
    job.wait("no prompt pod", lambda: "gpt-prompt" not in pods())


def test_a_text_on_the_volume_and_a_look_at_the_ledger(make_job: Make, tmp_path: Path) -> None:
    job, text = make_job(), tmp_path / "data.txt"
    text.write_text(Path(os.__file__).read_text())
    kubectl = lambda *words: job.cluster.kubectl("-n", job.spec.namespace, *words)  # noqa: E731
    with contextlib.suppress(
        AssertionError
    ):  # a new namespace has no service account for a moment, and refuses the pod
        job.apply(("namespace", "volume", "shell"))
    job.wait("the service account", lambda: "default" in kubectl("get", "serviceaccounts"), gone=True)
    job.apply(("namespace", "volume", "shell"))
    kubectl("wait", "--for=condition=Ready", f"--timeout={PATIENCE:.0f}s", "pod/gpt-shell")
    kubectl("cp", text, "gpt-shell:/workspace/data.txt")
    submit(job, "--text", "/workspace/data.txt")
    job.command("wait", "gpt")
    assert f"{SHORT} steps kept" in kubectl("exec", "gpt-shell", "--", "elastic-gpt", "ledger", "/workspace/gpt/run")
    with pytest.raises(AssertionError, match="exit code 2"):
        kubectl("exec", "gpt-shell", "--", "elastic-gpt", "leger")
    kubectl("delete", "pod", "gpt-shell")


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
