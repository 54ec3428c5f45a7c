"""OCI Data Science: the YAML is what ADS reads, and its entry point starts our elastic run from ADS' environment."""

import contextlib
import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from elastic_gpt.jobs import ads
from elastic_gpt.jobs.spec import JobSpec
from elastic_gpt.settings import SettingsError
from tests.conftest import PATIENCE, TINY, assert_same_run, elastic_gpt, environment, events, python_with, until
from tests.examples.schemas import assert_first_line_renders, lacking
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
        {"projectId", "compartmentId", "subnetId", "displayName", "shapeName", "blockStorageSize"},
    ),
    "spec.cluster": ({"kind", "apiVersion", "spec"}, {"kind", "spec"}),
    "spec.cluster.spec": (
        {"image", "workDir", "name", "config", "main", "worker", "ps", "ephemeral", "certificate"},
        {"image", "workDir", "main", "worker"},
    ),
    "spec.cluster.spec.main": ({"name", "image", "replicas", "config"}, {"replicas"}),
    "spec.cluster.spec.worker": ({"name", "image", "replicas", "config"}, {"replicas"}),
    "spec.runtime": ({"kind", "apiVersion", "type", "spec"}, {"kind", "type", "spec"}),
    "spec.runtime.spec": (
        {"entryPoint", "args", "kwargs", "env", "uri", "branch", "commit", "gitSecretId", "codeDir", "pythonPath"},
        {"entryPoint", "uri", "branch", "codeDir", "args", "env"},
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
    return found + lacking(tree, ("spec.runtime.spec.env.name", "spec.runtime.spec.env.value"))


def example() -> Tree:
    tree: Tree = yaml.safe_load(FILE.read_text())
    return tree


def test_the_example_is_what_the_command_in_its_first_line_renders() -> None:
    assert_first_line_renders(FILE)


def test_ads_reads_every_field_and_a_misspelt_or_missing_one_is_caught() -> None:
    assert errors(example()) == []
    for path, needed in [
        *((path, needed) for path, (_, needed) in READ.items()),
        ("spec.runtime.spec.env.0", {"name", "value"}),
    ]:
        for name in needed:
            for change in ("missing", "misspelt"):
                broken = copy.deepcopy(example())
                node: Any = broken
                for step in filter(None, path.split(".")):
                    node = node[int(step) if step.isdigit() else step]
                value = node.pop(name)
                if change == "misspelt":
                    node[f"{name}x"] = value
                assert errors(broken), f"{path}.{name} {change}"


@pytest.mark.parametrize("spec", [JobSpec(upload=(("a.txt", "one"),)), JobSpec(texts=("/workspace/a.txt",))])
def test_text_that_is_here_does_not_travel_to_oci(spec: JobSpec) -> None:
    with pytest.raises(
        SettingsError, match=r"a\.txt: OCI takes no file from here; .*oci://<bucket>@<namespace>/a\.txt"
    ):
        ads.job(spec)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (JobSpec(volume="mine", spot=True), "--volume, --spot: no effect on OCI; leave them out"),
        (JobSpec(memory=99), "--memory: no effect on OCI beside GPUs"),
        (JobSpec(arguments=("--checkpoint.dir=/c",)), r"--checkpoint.dir /c: a folder of one machine"),
        (JobSpec(gpus=3), "--gpus 3: shapes with A10s on OCI have 1, 2 or 4"),
        (JobSpec(arguments=("--data.dir", "data")), r"--data.dir data: a folder of one machine.*@<namespace>/data"),
    ],
)
def test_what_oci_has_not_is_refused(spec: JobSpec, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        ads.job(spec)


def test_data_that_are_in_a_bucket_already_are_not_prepared() -> None:
    [tree] = ads.job(JobSpec(arguments=("--data.dir=oci://mine@tenancy/data", "--run-dir", "oci://mine@tenancy/run")))
    spec = tree["spec"]["runtime"]["spec"]
    assert spec["args"] == ["gpt2_124m", "--data.dir=oci://mine@tenancy/data", "--run-dir", "oci://mine@tenancy/run"]
    assert "PREPARE" not in {one["name"] for one in spec["env"]}
    [tree] = ads.job(JobSpec(data_of="other"))
    assert "--data.dir=oci://<bucket>@<namespace>/other/data" in tree["spec"]["runtime"]["spec"]["args"]
    assert "PREPARE" not in {one["name"] for one in tree["spec"]["runtime"]["spec"]["env"]}


def environments(tree: Tree) -> list[dict[str, str]]:
    """What ADS gives the main node and each worker, as far as examples/oci/main.py and prepared.sh read it."""
    spec = tree["spec"]["runtime"]["spec"]
    count = tree["spec"]["cluster"]["spec"]["worker"]["replicas"]
    job = {one["name"]: one["value"] for one in spec["env"]} | {
        "OCI__WORKER_COUNT": str(count),
        "OCI__ENTRY_SCRIPT": spec["entryPoint"],
        "OCI__ENTRY_SCRIPT_ARGS": " ".join(spec["args"]),
    }
    modes = ["MAIN", *["WORKER"] * count]
    return [job | {"OCI__MODE": mode, "RANK": str(rank)} for rank, mode in enumerate(modes)]


# It wants PyYAML<=6.0.2 and click<=8.4.2 (by oci-cli). 0.9 GB on disk.
ADS = "oracle-ads[opctl]==2.16.1"
# What `ads opctl run` does with the file until it calls OCI. Its ConfigValidator checks nothing (2.16.1).
ADSS_OWN = """
import json, sys, yaml
from ads.opctl.backend.ads_ml_job import MLJobDistributedBackend
from ads.opctl.config.validator import ConfigValidator
from ads.opctl.config.yaml_parsers import YamlSpecParser
backend = MLJobDistributedBackend.__new__(MLJobDistributedBackend)
backend.config = {"execution": {}}
tree = ConfigValidator(yaml.safe_load(sys.stdin)).process().config
read = YamlSpecParser.parse_content(tree)
main, workers = backend.prepare_job_config(read)
environments = [dict(backend.job.runtime.envs) | run["envVars"] for run in (main, *workers)]
print(json.dumps({
    "cluster": [read.cluster.type, read.cluster.main.replicas, read.cluster.worker.replicas, read.cluster.work_dir],
    "infrastructure": backend.job.infrastructure.to_dict()["spec"],
    "image": backend.job.runtime.image,
    "environments": environments,
}))
"""


@pytest.mark.slow
def test_ads_own_loader_and_job_builder_take_it(tmp_path: Path) -> None:
    python = python_with(tmp_path / "ads", ADS)
    done = subprocess.run(
        [python, "-c", ADSS_OWN], input=FILE.read_text(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout.splitlines()[-1])
    assert read["cluster"] == ["PYTORCH", 1, 1, "oci://<bucket>@<namespace>/elastic-gpt"]
    assert read["image"] == example()["spec"]["cluster"]["spec"]["image"]
    given = example()["spec"]["infrastructure"]["spec"]
    assert {name: value for name, value in read["infrastructure"].items() if name in given} == given
    for theirs, ours in zip(read["environments"], environments(example()), strict=True):
        assert theirs | ours == theirs
        assert theirs["OCI__RUNTIME_URI"] == example()["spec"]["runtime"]["spec"]["uri"]
        assert (EXAMPLES.parent / theirs["OCI__ENTRY_SCRIPT"]).exists()


def run(script: Path, arguments: list[str], more: dict[str, str]) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env=environment(**more, PATH=path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("missing", ["OCI__MODE", "OCI__WORKER_COUNT", "MASTER_ADDR"])
def test_a_node_without_adss_environment_says_what_is_missing(missing: str) -> None:
    more = {"OCI__MODE": "MAIN", "OCI__WORKER_COUNT": "1", "MASTER_ADDR": "127.0.0.1"} | {missing: ""}
    node = run(EXAMPLES / "oci" / "main.py", ["debug_cpu", "--data.dir=x"], more)
    said, _ = node.communicate(timeout=PATIENCE)
    assert node.returncode == 2
    assert said == f"error: no {missing} in the environment: start this by `ads opctl run`\n"


@pytest.mark.parametrize("words", [["debug_cpu"], ["debug_cpu", "--run-dir=x"]])
def test_a_node_without_a_place_for_its_data_says_so(words: list[str]) -> None:
    more = {"OCI__MODE": "MAIN", "OCI__WORKER_COUNT": "1", "MASTER_ADDR": "127.0.0.1"}
    node = run(EXAMPLES / "oci" / "main.py", words, more)
    assert (
        node.communicate(timeout=PATIENCE)[0] == "error: no --data.dir PLACE: a URL, or a folder that all nodes mount\n"
    )
    assert node.returncode == 2


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_the_loss_of_the_main_node_resumes_from_object_storage(data: Path, s3_server: str, tmp_path: Path) -> None:
    """An S3 server (moto) stands in for OCI's object storage, and two local processes for its nodes."""
    pytest.importorskip("torch")
    from tests.nanogpt.test_places import fetched, memory, steps

    assert s3_server
    bucket = f"s3://bucket/{uuid.uuid4().hex}"
    flags = (*TINY, "--steps=400", "--evaluate.interval=0", "--checkpoint.interval=20")
    # Two nodes at least, so that the main node does not end before the worker has come.
    [tree] = ads.job(JobSpec(nodes=2, min_nodes=2, gpus=0, tokenizer="char", arguments=flags))

    nodes: list[subprocess.Popen[str]] = []

    def start(machines: str) -> None:
        port = free_port()
        more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        more["XDG_CACHE_HOME"] = str(tmp_path / machines)
        for one in environments(tree):
            words = one["OCI__ENTRY_SCRIPT_ARGS"].replace(ads.BUCKET, bucket).split()
            nodes.append(run(EXAMPLES.parent / one["OCI__ENTRY_SCRIPT"], words, one | more))
            # The address is that of both nodes here, so that the one that comes first would keep torchrun's store.
            until(lambda: listens(port) or nodes[-1].poll() is not None)

    try:
        start("machines")
        until(lambda: steps(f"{bucket}/elastic-gpt") >= 50 or nodes[0].poll() is not None)
        os.killpg(nodes[0].pid, signal.SIGKILL)
        said = nodes[1].communicate(timeout=PATIENCE)[0]
        assert nodes[1].returncode not in (0, None), said
        assert 50 <= steps(f"{bucket}/elastic-gpt") < 400
        prepared = fsspec.filesystem("s3").info(f"{bucket}/elastic-gpt/data/train.bin")["LastModified"]
        # The same job again, on machines that were never in it.
        shutil.rmtree(memory(f"{bucket}/elastic-gpt"))
        start("others")
        told = [node.communicate(timeout=PATIENCE)[0] for node in nodes[2:]]
    finally:
        for node in nodes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
    assert [node.returncode for node in nodes[2:]] == [0, 0], told
    folder = fetched(f"{bucket}/elastic-gpt", tmp_path / "run")
    assert [event["world_size"] for event in events(folder, "joined")] == [2, 2]
    assert events(folder, "restored")[-1]["source"].startswith("checkpoint step_")
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    assert (
        store.info(f"{bucket}/elastic-gpt/data/train.bin")["LastModified"] == prepared
    )  # the text was not prepared again
    elastic_gpt("train", "debug_cpu", *flags, "--data.dir", data, "--run-dir", tmp_path / "undisturbed")
    assert_same_run(folder, tmp_path / "undisturbed")
