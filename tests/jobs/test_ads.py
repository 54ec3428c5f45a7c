"""OCI Data Science: the YAML is what ADS reads, and its entry point starts our elastic run from ADS' environment."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_gpt.jobs import ads
from elastic_gpt.jobs.spec import JobSpec
from elastic_gpt.settings import SettingsError
from tests.conftest import PATIENCE, TINY, environment, events, metrics
from tests.examples.schemas import assert_first_line_renders
from tests.examples.test_torchrun import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"
FILE = EXAMPLES / "oci" / "job.yaml"
Tree = dict[str, Any]

# What ADS reads of each section (its distributed parser and its builder of jobs), and what it cannot do without.
READ = {
    "": ({"kind", "apiVersion", "spec"}, {"kind", "spec"}),
    "spec": ({"infrastructure", "cluster", "runtime"}, {"infrastructure", "cluster", "runtime"}),
    "spec.infrastructure": ({"kind", "type", "apiVersion", "spec"}, {"spec"}),
    "spec.infrastructure.spec": (
        {
            *("projectId", "compartmentId", "subnetId", "displayName", "logGroupId", "logId", "shapeName"),
            *("shapeConfigDetails", "blockStorageSize", "storageMount"),
        },
        {"projectId", "compartmentId", "displayName", "shapeName", "storageMount"},
    ),
    "spec.cluster": ({"kind", "apiVersion", "spec"}, {"kind", "spec"}),
    "spec.cluster.spec": (
        {"image", "workDir", "name", "config", "main", "worker", "ps", "ephemeral", "certificate"},
        {"image", "workDir", "main"},
    ),
    "spec.cluster.spec.main": ({"name", "image", "replicas", "config"}, {"replicas"}),
    "spec.cluster.spec.worker": ({"name", "image", "replicas", "config"}, {"replicas"}),
    "spec.runtime": ({"kind", "apiVersion", "type", "spec"}, {"kind", "type", "spec"}),
    "spec.runtime.spec": (
        {"entryPoint", "args", "kwargs", "env", "uri", "branch", "commit", "gitSecretId", "codeDir", "pythonPath"},
        {"entryPoint", "uri", "codeDir", "args"},
    ),
}


def errors(tree: Tree) -> list[str]:
    """What ADS would not read, and what it would miss."""
    found = []
    for path, (known, needed) in READ.items():
        node: Any = tree
        for step in filter(None, path.split(".")):
            node = node.get(step) if isinstance(node, dict) else None
        if node is not None:
            found += [f"{path}.{name} is not read" for name in set(node) - known]
            found += [f"{path}.{name} is missing" for name in needed - set(node)]
    return found


def example() -> Tree:
    tree: Tree = yaml.safe_load(FILE.read_text())
    return tree


def test_the_example_is_what_the_command_in_its_first_line_renders() -> None:
    assert_first_line_renders(FILE)


def test_ads_reads_every_field_and_a_misspelt_or_missing_one_is_caught() -> None:
    assert errors(example()) == []
    for path, (_, needed) in READ.items():
        for name in needed:
            for change in ("missing", "misspelt"):
                broken = copy.deepcopy(example())
                node = broken
                for step in filter(None, path.split(".")):
                    node = node[step]
                value = node.pop(name)
                if change == "misspelt":
                    node[f"{name}x"] = value
                assert errors(broken), f"{path}.{name} {change}"


def test_text_that_is_here_does_not_travel_to_oci() -> None:
    with pytest.raises(SettingsError, match=r"a\.txt: OCI takes no file from here"):
        ads.job(JobSpec(upload=(("a.txt", "one"),)))


def environments(tree: Tree) -> list[dict[str, str]]:
    """What ADS gives the main node and each worker; its own code says so where it is installed."""
    try:
        from ads.opctl.backend.ads_ml_job import MLJobDistributedBackend
        from ads.opctl.config.yaml_parsers import YamlSpecParser
    except ModuleNotFoundError:
        spec = tree["spec"]["runtime"]["spec"]
        count = tree["spec"]["cluster"]["spec"]["worker"]["replicas"]
        job = {one["name"]: one["value"] for one in spec["env"]} | {
            "OCI__WORKER_COUNT": str(count),
            "OCI__ENTRY_SCRIPT": spec["entryPoint"],
            "OCI__ENTRY_SCRIPT_ARGS": " ".join(spec["args"]),
        }
        modes = ["MAIN", *["WORKER"] * count]
        return [job | {"OCI__MODE": mode, "RANK": str(rank)} for rank, mode in enumerate(modes)]
    backend = MLJobDistributedBackend.__new__(MLJobDistributedBackend)
    backend.config = {"execution": {}}
    main, workers = backend.prepare_job_config(YamlSpecParser.parse_content(tree))
    return [dict(backend.job.runtime.envs) | run["envVars"] for run in (main, *workers)]


def test_ads_own_loader_and_job_builder_take_it() -> None:
    pytest.importorskip("ads.opctl", reason="pip install 'oracle-ads[opctl]' (580 MB)")
    from ads.opctl.config.yaml_parsers import YamlSpecParser

    read = YamlSpecParser.parse_content(example())
    assert (read.cluster.type, read.cluster.main.replicas, read.cluster.worker.replicas) == ("PYTORCH", 1, 1)
    assert read.cluster.work_dir == "oci://<bucket>@<namespace>/elastic-gpt"
    assert (read.runtime.type, read.runtime.branch) == ("git", "main")
    assert (EXAMPLES.parent / read.runtime.entry_point).exists()
    main, worker = environments(example())
    assert (main["OCI__MODE"], worker["OCI__MODE"]) == ("MAIN", "WORKER")
    assert (main["RANK"], worker["RANK"]) == ("0", "1")
    assert (main["OCI__RUNTIME_URI"], main["OCI__WORKER_COUNT"]) == (read.runtime.uri, "1")


def run(script: Path, arguments: list[str], more: dict[str, str]) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env=environment(**more, PATH=path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("missing", ["OCI__MODE", "OCI__WORKER_COUNT", "MASTER_ADDR"])
def test_a_node_without_adss_environment_says_what_is_missing(missing: str) -> None:
    more = {"OCI__MODE": "MAIN", "OCI__WORKER_COUNT": "1", "MASTER_ADDR": "127.0.0.1"} | {missing: ""}
    node = run(EXAMPLES / "oci" / "main.py", ["debug_cpu", "--data.dir=x"], more)
    said, _ = node.communicate(timeout=PATIENCE)
    assert node.returncode == 2
    assert said == f"error: no {missing} in the environment: start this by `ads opctl run`\n"


@pytest.mark.slow
def test_the_main_node_and_a_worker_train_together_from_adss_environment(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    flags = (*TINY, "--steps=40", "--evaluate.interval=0", f"--checkpoint.dir={tmp_path / 'bucket'}")
    # Two nodes at least, so that the main node does not end before the worker has come.
    [tree] = ads.job(JobSpec(nodes=2, min_nodes=2, gpus=0, tokenizer="char", arguments=flags))
    port = str(free_port())
    nodes = []
    for more in environments(tree):
        words = more["OCI__ENTRY_SCRIPT_ARGS"].replace(ads.SHARED, str(tmp_path)).split()
        words = [word for word in words if not word.startswith("--checkpoint.dir=oci:")]
        more |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        nodes.append(run(EXAMPLES.parent / more["OCI__ENTRY_SCRIPT"], words, more))
    try:
        said = [node.communicate(timeout=PATIENCE)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    folder = tmp_path / "elastic-gpt" / "run"
    assert len(metrics(folder)) == 40
    assert [event["world_size"] for event in events(folder, "joined")] == [2]
    assert list((tmp_path / "bucket").glob("step_00000040/model.safetensors"))
