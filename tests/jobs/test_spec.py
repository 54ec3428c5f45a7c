"""spec.py: what a person decides about a job, and what follows from it."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elastic_gpt.jobs import commands
from elastic_gpt.jobs.manifest import Tree, manifests
from elastic_gpt.jobs.spec import JobSpec, presets, read_texts
from elastic_gpt.settings import SettingsError

VALUES: dict[str, list[str]] = {
    "--gpus": ["0", "1", "8"], "--cpus": ["0", "16"], "--nodes": ["1", "2", "4"], "--min-nodes": ["1", "2"],
    "--max-nodes": ["2", "4", "900"], "--memory": ["0", "64"],
    "--preset": ["", *(path.stem for path in presets().glob("*.yaml"))],
    "--tokenizer": ["gpt2", "char", "word", "byte", "bpe"], "--vocab-size": ["-1", "0", "3", "4", "257", "4096"],
    "--text": ["/workspace/a.txt", "s3://bucket/b.jsonl.zst"], "--data-of": ["", "other"], "--env": ["A=b"],
}  # fmt: skip
flag_lists = st.fixed_dictionaries(
    {}, optional={flag: st.sampled_from(values) for flag, values in VALUES.items()}
).flatmap(lambda given: st.permutations([f"{flag}={value}" for flag, value in given.items()]))
more_flags = st.lists(st.sampled_from(["--network-check", "--spot"]), unique=True)
trailing = st.lists(
    st.sampled_from(["--steps=5", "--model.n-layer=2", "--optimizer.learning-rate=1e-3", "--elastic.exact"]),
    unique=True,
)


@settings(max_examples=150)
@given(flag_lists, more_flags, trailing)
@example(["--tokenizer=bpe"], [], [])
@example(["--tokenizer=bpe", "--vocab-size=257"], [], [])
@example(["--tokenizer=word"], [], [])
@example(["--tokenizer=char", "--data-of=other"], [], [])
def test_what_the_client_takes_the_pods_take(flags: list[str], more: list[str], arguments: list[str]) -> None:
    taken = accepted(flags, more, arguments)
    if taken is None:
        return
    made = list(manifests(taken))
    assert "ElasticJob" in [tree["kind"] for tree in made]
    for tree in made:
        if tree["kind"] == "Job":
            prepare_takes(tree)
        if tree["kind"] == "ElasticJob":
            worker_takes(tree)


@pytest.mark.parametrize("tokenizer", VALUES["--tokenizer"])
def test_every_tokenizer_that_is_offered_can_be_had(tokenizer: str) -> None:
    spec = accepted([f"--tokenizer={tokenizer}", *(["--vocab-size=4096"] if tokenizer == "bpe" else [])], [], [])
    assert spec
    prepare_takes(next(tree for tree in manifests(spec) if tree["kind"] == "Job"))


def accepted(flags: list[str], more: list[str], arguments: list[str]) -> JobSpec | None:
    """What the client makes of a command line; None where it refuses it."""
    args = commands._parser("elastic-gpt job").parse_args(["submit", *flags, *more])
    try:
        return commands._spec(args, tuple(arguments), "training")
    except SettingsError:
        return None


def prepare_takes(tree: Tree) -> None:
    from prepare.prepare import _parse

    program, command, *words = tree["spec"]["template"]["spec"]["containers"][0]["args"]
    assert (program, command) == ("elastic-gpt", "prepare")
    flags = _parse(words, "prepare")  # exits where it refuses
    assert flags.tokenizer != "bpe" or flags.vocab_size >= 257


def worker_takes(tree: Tree) -> None:
    pytest.importorskip("torch")
    from elastic_gpt.nodes import launch
    from elastic_gpt.settings import parse
    from model_zoo.nanogpt.config import PRESETS, TrainConfig

    program, command, *words = tree["spec"]["replicaSpecs"]["worker"]["template"]["spec"]["containers"][0]["args"]
    assert (program, command) == ("elastic-gpt", "launch")
    seen: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run_node", lambda command, **nodes: seen.update(nodes, command=command) or 0)
        assert launch.main(words) == 0
    train, *flags = seen["command"]
    assert train == "train"
    parse(TrainConfig, flags, presets=PRESETS, prog="elastic-gpt train", environment={})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Mine"}, "job name 'Mine': take small letters"),
        ({"name": "1st"}, "a letter first"),
        ({"name": "a" * 38}, "at most 37"),
        ({"namespace": ""}, "--namespace ''"),
        ({"nodes": 5, "max_nodes": 4}, "--nodes 5 is outside 1 to 4"),
        ({"max_nodes": -1}, "--min-nodes 1 and --max-nodes -1 are not a range"),
        ({"nodes": 0, "min_nodes": 0}, "are not a range"),
        ({"min_nodes": 5}, "are not a range"),
        ({"gpus": -1}, "--gpus -1: it must not be negative"),
        ({"memory": 3}, "--memory 3: the snapshots alone take 4 GiB; take 11"),
        ({"volume_size": "20GB"}, "--volume-size '20GB': write a size such as 20Gi"),
        ({"texts": ("/home/me.txt",)}, "below /workspace"),
        ({"texts": ("/workspace/a",), "data_of": "other"}, "--text and --data-of"),
        ({"gpus": 0, "network_check": True}, "--network-check: DLRover checks GPUs"),
        ({"tokenizer": "bpe"}, "--tokenizer bpe --vocab-size 0: at least 257; 4096, say"),
        ({"tokenizer": "word", "vocab_size": 3}, "--tokenizer word --vocab-size 3: at least 4"),
        ({"tokenizer": "char", "vocab_size": 300}, "--vocab-size 300: it is for --tokenizer bpe and word"),
        ({"tokenizer": "char", "data_of": "mine"}, "--tokenizer and --data-of: the data of mine have a tokenizer"),
        ({"arguments": ("steps=5",)}, "'steps=5' after --: flags of `elastic-gpt train` look like --steps 100"),
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


def test_two_texts_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "data.txt").write_text(folder)
    with pytest.raises(SettingsError, match=r"another text is called data\.txt"):
        read_texts([str(tmp_path / "a" / "data.txt"), str(tmp_path / "b" / "data.txt")])
