"""What a person decides, and what follows from it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elastic_gpt.jobs.manifest import JOB_LABEL, PARTS, Tree, manifests
from elastic_gpt.jobs.render import NOTES, _places, to_yaml
from elastic_gpt.jobs.spec import JobSpec, presets, read_texts
from elastic_gpt.jobs.status import job_range, job_state
from elastic_gpt.settings import SettingsError

names = st.from_regex(r"[a-z]([-a-z0-9]{0,35}[a-z0-9])?", fullmatch=True)
words = st.text("abc.-_XYZ019/", min_size=1, max_size=20)


@st.composite
def specs(draw: Any) -> JobSpec:
    least, nodes, most = sorted(draw(st.lists(st.integers(1, 1000), min_size=3, max_size=3)))
    gpus = draw(st.integers(0, 16))
    width = 64 * draw(st.integers(1, 64))
    return JobSpec(
        name=draw(names),
        namespace=draw(names),
        image=draw(st.sampled_from(["", "registry.example.com/gpt:1"])),
        pull_secret=draw(st.sampled_from(["", "registry"])),
        preset=draw(st.sampled_from(["", *(path.stem for path in presets().glob("*.yaml"))])),
        arguments=(f"--model.n-layer={draw(st.integers(1, 100))}", "--model.n-embd", str(width)),
        nodes=nodes,
        min_nodes=least,
        max_nodes=most,
        gpus=gpus,
        cpus=draw(st.integers(0, 128)),
        network_check=gpus > 0 and draw(st.booleans()),
        spot=draw(st.booleans()),
        node_selector=tuple(draw(st.dictionaries(names, words, max_size=2)).items()),
        env=tuple(draw(st.dictionaries(names, st.text(max_size=20), max_size=2)).items()),
        volume=draw(names),
        access_mode=draw(st.sampled_from(["ReadWriteMany", "ReadWriteOnce"])),
        data_of=draw(st.sampled_from(["", "other"])),
        tokenizer=draw(st.sampled_from(["gpt2", "char"])),
    )


@settings(max_examples=40)
@given(specs())
def test_every_job_has_its_names_its_range_and_its_memory(spec: JobSpec) -> None:
    trees = manifests(spec, tuple(PARTS))
    assert {tree["metadata"].get("namespace", spec.namespace) for tree in trees} == {spec.namespace}
    keys = [(tree["kind"], tree["metadata"]["name"]) for tree in trees]
    assert len(keys) == len(set(keys))
    [job] = [tree for tree in trees if tree["kind"] == "ElasticJob"]
    assert job_range(job) == (spec.min_nodes, spec.max_nodes)
    assert job_state(job, []).wanted == spec.nodes
    assert job["metadata"]["labels"] == {JOB_LABEL: spec.name}
    pod = job["spec"]["replicaSpecs"]["worker"]["template"]["spec"]
    [shm] = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "snapshots"]
    assert 2 * 12 * spec.parameters <= int(shm["sizeLimit"].removesuffix("Gi")) * 2**30
    assert spec.shm_gib < spec.memory_gib
    assert all(len(name) <= 63 for _, name in keys)
    assert ("nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]) == (spec.gpus > 0)


@settings(max_examples=40)
@example(JobSpec(env=(("A", "\x85\U000579e4`"), ("B", "a\u2028\n b"))))
@given(specs())
def test_a_job_is_the_same_each_time_and_yaml_says_what_the_dicts_say(spec: JobSpec) -> None:
    trees = manifests(spec, tuple(PARTS))
    assert manifests(spec, tuple(PARTS)) == trees  # nothing is shared between the calls that one could have changed
    assert list(yaml.safe_load_all(to_yaml(trees, "a heading"))) == trees


def test_every_note_stands_somewhere() -> None:
    spec = JobSpec(spot=True, network_check=True, upload=(("a.txt", "text"),))
    found: dict[str, set[str]] = {}
    for tree in manifests(spec, tuple(PARTS)):
        node = yaml.compose(yaml.safe_dump(tree), Loader=yaml.SafeLoader)
        found.setdefault(tree["kind"], set()).update(path for path, _, _ in _places(node, ""))
    missing = [(kind, path) for kind, notes in NOTES.items() for path in notes if path not in found[kind]]
    assert missing == []


@pytest.mark.parametrize(
    "lines", [to_yaml(manifests(JobSpec(spot=True, network_check=True), tuple(PARTS))).splitlines()]
)
def test_lines_are_short_enough_to_read(lines: list[str]) -> None:
    assert [line for line in lines if len(line) > 128] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Mine"}, "job name 'Mine': take small letters"),
        ({"name": "1st"}, "a letter first"),
        ({"name": "a" * 38}, "at most 37"),
        ({"namespace": ""}, "--namespace ''"),
        ({"nodes": 5}, "--nodes 5 is outside 1 to 4"),
        ({"nodes": 0, "min_nodes": 0}, "are no range"),
        ({"min_nodes": 5}, "are no range"),
        ({"gpus": -1}, "--gpus -1: it must not be negative"),
        ({"memory": 3}, "--memory 3: the snapshots alone take 4 GiB; take 11"),
        ({"volume_size": "20GB"}, "--volume-size '20GB': write a size such as 20Gi"),
        ({"texts": ("/home/me.txt",)}, "below /workspace"),
        ({"texts": ("/workspace/a",), "data_of": "other"}, "--text and --data-of"),
        ({"gpus": 0, "network_check": True}, "--network-check: DLRover checks GPUs"),
        ({"preset": "gpt2"}, "did you mean 'gpt2_124m'?"),
        ({"preset": "mine.yaml"}, "the image has no file of yours"),
        ({"arguments": ("--model.n-layer", "many"), "memory": 9}, "--model.n-layer 'many': give a number"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_the_cure(change: Tree, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        manifests(JobSpec(**change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_last_size_of_a_model_wins_as_it_does_in_training() -> None:
    once = JobSpec(arguments=("--model.n-layer=24",))
    twice = JobSpec(arguments=("--model.n-layer=6", "--model.n-layer", "24"))
    assert twice.parameters == once.parameters > JobSpec().parameters


def test_gpt2s_size_is_known_within_a_thousandth() -> None:
    assert JobSpec().parameters == pytest.approx(124_439_808, rel=1e-3)
    assert (JobSpec().shm_gib, JobSpec().memory_gib, JobSpec(gpus=0).memory_gib) == (4, 11, 4)


def test_texts_are_sorted_into_those_here_and_those_there(tmp_path: Path) -> None:
    text = tmp_path / "data.txt"
    text.write_text("Welcome, sweet prince.\n")
    assert read_texts(["/workspace/a.txt", str(text), "s3://bucket/b.txt"]) == (
        ("/workspace/a.txt", "s3://bucket/b.txt"),
        (("data.txt", "Welcome, sweet prince.\n"),),
    )


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"\xff", "data.txt", "not UTF-8 at byte 0"),
        (b"x" * 1_000_001, "data.txt", "up to 1 MB travels"),
        (b"x", "my text.txt", "rename it"),
        (None, "data.txt", "name a file here, or one on the volume"),
    ],
)
def test_a_text_that_cannot_travel_is_refused(tmp_path: Path, content: bytes | None, name: str, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingsError) as error:
        read_texts([str(tmp_path / name)])
    assert message in str(error.value)


def test_a_text_of_ones_own_is_what_prepare_reads() -> None:
    spec = JobSpec(name="mine", upload=(("data.txt", "text"),), tokenizer="char")
    trees = {tree["kind"]: tree for tree in manifests(spec)}
    assert trees["ConfigMap"]["data"] == {"data.txt": "text"}
    pod = trees["Job"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["args"] == [
        "elastic-gpt", "prepare", "/text/data.txt", "--output-dir=/workspace/mine/data", "--tokenizer=char",
    ]  # fmt: skip
    assert {"name": "text", "configMap": {"name": trees["ConfigMap"]["metadata"]["name"]}} in pod["volumes"]


def test_a_job_on_anothers_data_prepares_none() -> None:
    trees = manifests(JobSpec(name="big", data_of="mine"))
    assert "Job" not in {tree["kind"] for tree in trees}
    args = trees[-1]["spec"]["replicaSpecs"]["worker"]["template"]["spec"]["containers"][0]["args"]
    assert {"--data.dir=/workspace/mine/data", "--run-dir=/workspace/big/run"} <= set(args)
