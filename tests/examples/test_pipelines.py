"""Kubeflow Pipelines: compiled, and run by kfp's own local runner, in an environment of kfp's own (it wants other versions)."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_gpt.jobs import commands
from tests.conftest import PATIENCE, TINY, environment, metrics, python_with

FOLDER = Path(__file__).parents[2] / "examples" / "pipelines"
KUBEFLOW = FOLDER.parent / "kubeflow"
KFP = "kfp==2.17.3"
LOCAL = f"""
import json, sys
from kfp import local
sys.path.insert(0, {str(FOLDER)!r})
import gpt
root = sys.argv[1]
local.init(local.SubprocessRunner(use_venv=False), pipeline_root=root, enable_caching=True, cache_root=root + "/cache")
gpt.PIPELINES[sys.argv[2]](**json.loads(sys.argv[3]))
"""
Tree = dict[str, Any]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has kfp, which wants kubernetes<31 and protobuf<7."""
    return python_with(tmp_path_factory.mktemp("kfp"), KFP)


def run(folder: Path, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
    """With `elastic-gpt` of this environment in the PATH, as the image has it."""
    return subprocess.run(
        [str(word) for word in words],
        cwd=folder,  # in the repository, its folder docker/ would be taken for the package that kfp imports
        env=environment(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )


STEPS = {
    "gpt": {"prepare": set(), "train": {"prepare"}, "evaluate": {"prepare", "train"}, "export": {"train"}},
    "gpt_trainjobs": {"trainjob": set(), "trainjob-2": {"trainjob"}, "trainjob-3": {"trainjob-2"}},
    "gpt_vertex": {"gpt": set(), "deploy": {"gpt"}},
}
REQUIRED = {"gpt": set(), "gpt_trainjobs": set(), "gpt_vertex": {"project", "region"}}  # parameters


@pytest.mark.parametrize("name", STEPS)
def test_a_pipeline_compiles_and_its_steps_wait_for_what_they_need(python: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "pipeline.yaml"
    done = run(tmp_path, python, FOLDER / "gpt.py", name, file, IMAGE="registry/mine:1")
    assert done.returncode == 0, done.stdout
    tree = next(iter(yaml.safe_load_all(file.read_text())))
    assert {task: set(body.get("dependentTasks", [])) for task, body in tree["root"]["dag"]["tasks"].items()} == STEPS[
        name
    ]
    executors = tree["deploymentSpec"]["executors"].values()
    assert {executor["container"]["image"] for executor in executors} == {"registry/mine:1"}
    assert not any("pip install" in word for executor in executors for word in executor["container"]["command"])
    artifacts = {
        kind["artifactType"]["schemaTitle"]
        for component in tree["components"].values()
        for kind in component.get("outputDefinitions", {}).get("artifacts", {}).values()
    }
    # A result is taken again while its inputs are the same, but that of a step that changes something elsewhere.
    cached = {task: bool(body["cachingOptions"]) for task, body in tree["root"]["dag"]["tasks"].items()}
    assert cached == {task: task not in ("deploy",) and name != "gpt_trainjobs" for task in STEPS[name]}
    parameters = tree["root"]["inputDefinitions"]["parameters"]
    if name == "gpt_trainjobs":
        assert_the_toy(parameters["options"]["defaultValue"])
    assert {given for given, how in parameters.items() if not how.get("isOptional")} == REQUIRED[name]
    assert artifacts == (set() if name == "gpt_trainjobs" else {"system.Dataset", "system.Model", "system.Metrics"})


def assert_the_toy(options: list[str]) -> None:
    """As they come, the TrainJobs are those of examples/kubeflow/, which fit its volume."""
    for step in ("load-corpus", "train-gpt", "generative-prompt"):
        rendered = io.StringIO()
        with contextlib.redirect_stdout(rendered):
            assert commands.main(["render", "--as=trainjob", f"--only={step}", *options]) == 0
        text = rendered.getvalue().replace("registry/mine:1", "elastic-gpt:0.1.0-cpu")
        wanted = (KUBEFLOW / f"{step}.yaml").read_text()
        if step == "load-corpus":  # that has a text from the web, and here it is the sample
            text, wanted = (re.sub(r"- (--sample|https:.*)", "- TEXT", one) for one in (text, wanted))
        assert list(yaml.safe_load_all(text)) == list(yaml.safe_load_all(wanted))


def test_text_becomes_a_model_that_is_measured_and_exported(python: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    wanted = {"tokenizer": "char", "preset": "kubeflow_toy", "flags": [*TINY, "--steps=20", "--evaluate.interval=0"]}
    done = run(tmp_path, python, "-c", LOCAL, tmp_path, "gpt", json.dumps(wanted))
    assert done.returncode == 0, done.stdout
    [made] = tmp_path.glob("gpt-*")
    assert len(metrics(made / "train" / "run")) == 20
    told = json.loads((made / "evaluate" / "executor_output.json").read_text())
    measured = told["artifacts"]["metrics"]["artifacts"][0]["metadata"]
    assert 0 < measured["loss"] < 5
    assert measured["step"] == 20
    assert {"model.safetensors", "tokenizer.json"} <= {path.name for path in (made / "export" / "model").iterdir()}
    # With another parameter of training alone, the text is not prepared again.
    wanted["flags"] = [*TINY, "--steps=30", "--evaluate.interval=0"]
    again = run(tmp_path, python, "-c", LOCAL, tmp_path, "gpt", json.dumps(wanted))
    assert again.returncode == 0, again.stdout
    executed = [set(re.findall(r"Executing task \S*'(\w+)'", told)) for told in (done.stdout, again.stdout)]
    assert executed == [{"prepare", "train", "evaluate", "export"}, {"train", "evaluate", "export"}]
    [other] = set(tmp_path.glob("gpt-*")) - {made}
    assert len(metrics(other / "train" / "run")) == 30


class Kubernetes:
    """A stand-in for the API server: keeps what is made; a TrainJob has ended when it is asked for a second time."""

    def __init__(self, fails: str = "") -> None:
        self.made: list[Tree] = []
        asked: set[str] = set()
        kubernetes = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                tree = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if any(one["kind"] == tree["kind"] and one["metadata"] == tree["metadata"] for one in kubernetes.made):
                    self.answer(409, {"kind": "Status", "reason": "AlreadyExists"})
                else:
                    kubernetes.made.append(tree)
                    self.answer(201, tree)

            def do_GET(self) -> None:
                *_, namespace, plural, name = self.path.split("/")
                assert (namespace, plural) == ("training", "trainjobs")
                condition = {"type": "Failed" if name == fails else "Complete", "status": "True", "message": "OOM"}
                # While it runs, a TrainJob has a condition that is not true.
                status = "True" if name in asked else "False"
                asked.add(name)
                self.answer(200, {"status": {"conditions": [condition | {"status": status}]}})

            def answer(self, code: int, tree: Tree) -> None:
                data = json.dumps(tree).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def config(self, folder: Path) -> str:
        server = f"http://127.0.0.1:{self.server.server_address[1]}"
        path = folder / "kubeconfig"
        tree = {
            "current-context": "it",
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "me"}}],
            "clusters": [{"name": "it", "cluster": {"server": server}}],
            "users": [{"name": "me", "user": {"token": "secret"}}],
        }
        path.write_text(yaml.safe_dump(tree))
        return str(path)


@pytest.fixture
def kubernetes(request: pytest.FixtureRequest) -> Iterator[Kubernetes]:
    made = Kubernetes(request.param)
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.mark.parametrize(
    ("kubernetes", "code", "steps"),
    [("", 0, ["load-corpus", "train-gpt", "generative-prompt"]), ("train-gpt", 1, ["load-corpus", "train-gpt"])],
    indirect=["kubernetes"],
    ids=["all complete", "training fails"],
)
def test_trainjobs_follow_each_other_and_one_that_fails_ends_the_pipeline(
    python: Path, tmp_path: Path, kubernetes: Kubernetes, code: int, steps: list[str]
) -> None:
    done = run(tmp_path, python, "-c", LOCAL, tmp_path, "gpt_trainjobs", "{}", KUBECONFIG=kubernetes.config(tmp_path))
    assert done.returncode == code, done.stdout
    assert [(tree["kind"], tree["metadata"]["name"]) for tree in kubernetes.made] == [
        (kind, f"{step}{suffix}")
        for step in steps
        for kind, suffix in (("TrainingRuntime", "-runtime"), ("TrainJob", ""))
    ]
    assert ("trainjob train-gpt failed: OOM" in done.stdout) == bool(code)
