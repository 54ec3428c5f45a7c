"""manifest.py: what a job's manifests say of its names, range, memory and data."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_gpt.jobs.manifest import JOB_LABEL, PARTS, manifests
from elastic_gpt.jobs.spec import JobSpec, presets
from elastic_gpt.jobs.status import job_range, job_state

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
        tokenizer="gpt2",
    )


@settings(max_examples=40)
@given(specs())
def test_every_job_has_its_names_its_range_and_its_memory(spec: JobSpec) -> None:
    trees = manifests(spec, tuple(PARTS))
    assert {tree["metadata"].get("namespace", spec.namespace) for tree in trees} == {spec.namespace}
    keys = [(tree["kind"], tree["metadata"]["name"]) for tree in trees]
    assert len(keys) == len(set(keys))
    [job] = [tree for tree in trees if tree["kind"] == "ElasticJob"]
    assert job_range(job) == (spec.min_nodes, spec.used_max_nodes)
    assert job_state(job, []).wanted == spec.nodes
    assert job["metadata"]["labels"] == {JOB_LABEL: spec.name}
    pod = job["spec"]["replicaSpecs"]["worker"]["template"]["spec"]
    [shm] = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "snapshots"]
    assert 2 * 12 * spec.parameters <= int(shm["sizeLimit"].removesuffix("Gi")) * 2**30
    assert spec.shm_gib < spec.memory_gib
    assert all(len(name) <= 63 for _, name in keys)
    assert ("nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]) == (spec.gpus > 0)


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
