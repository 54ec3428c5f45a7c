"""initial.py: runs that start from given weights, and what has to fit."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from elastic_gpt.settings import SettingsError
from elastic_gpt.storage import Unreachable
from model_zoo.nanogpt import train
from model_zoo.nanogpt.export import export
from model_zoo.nanogpt.loading import load
from model_zoo.nanogpt.model import GPTConfig
from prepare.data import load_tokenizer
from prepare.prepare import main as prepare
from tests.conftest import elastic_gpt, metrics
from tests.nanogpt.test_generate import write_run
from tests.nanogpt.test_loading import CPU, logits, random_model

SHAPE = GPTConfig(256, block_size=32, n_layer=1, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few bytes again and again, which are learned quickly."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "text.txt").write_text("the same few words again and again\n" * 300)
    prepare([str(folder / "text.txt"), "--tokenizer", "byte", "--output-dir", str(folder / "data")])
    return folder / "data"


def words(data: Path, run: Path, start: Path | str | None, *more: str, n_head: int = 2) -> list[str]:
    return [
        *("debug_cpu", f"--data.dir={data}", f"--run-dir={run}", "--global-batch=4", "--micro-batch=4"),
        *(
            "--model.block-size=32",
            "--model.n-layer=1",
            f"--model.n-head={n_head}",
            "--model.n-embd=32",
            "--device=cpu",
        ),
        *("--steps=1", "--observe.tensorboard=false", *([f"--init-from={start}"] if start else []), *more),
    ]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    elastic_gpt("train", *words(data, run, None, "--steps=60", "--optimizer.learning-rate=3e-3"))
    return run


@pytest.mark.parametrize("kind", ["run", "huggingface", "nanogpt"])
def test_training_goes_on_from_where_the_weights_are(data: Path, trained: Path, tmp_path: Path, kind: str) -> None:
    start = trained
    if kind != "run":
        start = tmp_path / "start"
        export(load(trained, CPU), start, kind, "trained")
    elastic_gpt("train", *words(data, tmp_path / "run", start, "--model.block-size=24"))  # fewer positions
    first, reached = metrics(tmp_path / "run")[0]["loss"], metrics(trained)[-1]["loss"]
    assert metrics(trained)[0]["loss"] > 5
    assert first < reached + 0.3


def test_another_form_of_gelu_than_the_weights_were_trained_with_is_said(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    export(load(trained, CPU), tmp_path / "start", "nanogpt", "trained")
    checkpoint = torch.load(tmp_path / "start" / "ckpt.pt", weights_only=True)
    del checkpoint["config"]["activation"]  # which nanoGPT does not write: it knows the erf form only
    torch.save(checkpoint, tmp_path / "start" / "ckpt.pt")
    said = [
        elastic_gpt("train", *words(data, tmp_path / name, tmp_path / "start", *more)).stdout
        for name, more in (("nearly", []), ("very", ["--model.activation=gelu_erf"]))
    ]
    assert ["--model.activation gelu_erf is the very same" in text for text in said] == [True, False]


def test_the_run_needs_its_start_until_it_has_a_checkpoint_and_not_after(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    start = shutil.copytree(trained, tmp_path / "start")
    run = tmp_path / "run"
    elastic_gpt("train", *words(data, run, start))
    shutil.rmtree(start)
    elastic_gpt("train", *words(data, run, start, "--steps=2"))
    assert [line["step"] for line in metrics(run)] == [1, 2]


def test_the_start_is_part_of_the_runs_identity(data: Path, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    elastic_gpt("train", *words(data, run, trained))
    moved = shutil.copytree(trained, tmp_path / "moved")
    elastic_gpt("train", *words(data, run, moved, "--steps=2"))  # the same weights, elsewhere
    other = write_run(tmp_path / "other", load_tokenizer(data), random_model(SHAPE))
    for start in (None, other):
        done = elastic_gpt("train", *words(data, run, start, "--steps=3"), code=2)
        assert "init_from_fingerprint=" in done.stderr
        assert "--run-dir" in done.stderr
        assert len([line for line in done.stderr.splitlines() if not line.startswith("note: ")]) == 1


def test_a_run_of_a_version_that_knew_no_start_started_from_random_weights(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    elastic_gpt("train", *words(data, run, None))
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    del resolved["init_from"], resolved["init_from_fingerprint"]
    (run / "config.yaml").write_text(yaml.safe_dump(resolved))
    done = elastic_gpt("train", *words(data, run, trained, "--steps=2"), code=2)
    assert "init_from_fingerprint=None" in done.stderr
    elastic_gpt("train", *words(data, run, None, "--steps=2"))


def test_weights_that_were_exchanged_before_the_first_checkpoint_are_refused(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    start, run = shutil.copytree(trained, tmp_path / "start"), tmp_path / "run"
    elastic_gpt("train", *words(data, run, start))
    shutil.rmtree(run / "checkpoints")
    (run / "ledger.jsonl").write_text(
        "".join(line for line in (run / "ledger.jsonl").open() if '"saved"' not in line and '"finished"' not in line)
    )
    shutil.rmtree(start)
    write_run(start, load_tokenizer(data), random_model(SHAPE))
    done = elastic_gpt("train", *words(data, run, start), code=2)
    assert "holds other weights" in done.stderr


def test_what_does_not_fit_is_named_before_anything_is_made(data: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("other words " * 500)
    prepare([str(tmp_path / "text.txt"), "--tokenizer", "char", "--output-dir", str(tmp_path / "char")])
    run = tmp_path / "run"
    for argv, complaints in (
        (words(data, run, trained, n_head=4), ["n_head is 4", "there it is 2"]),
        (words(data, run, trained, "--model.block-size=64"), ["block_size is 64", "only shrink"]),
        (words(data, run, trained, "--model.bias=false"), ["model.bias is false"]),
        (words(tmp_path / "char", run, trained), ["another tokenizer", "byte", "char"]),
        (words(data, run, tmp_path / "nowhere"), ["nowhere", "no run directory"]),
    ):
        with pytest.raises(SettingsError) as caught:
            train.check(argv)
        assert all(word in str(caught.value) for word in ["init_from", *complaints])
    with pytest.raises(Unreachable, match=r"init_from: http://127\.0\.0\.1:9/start cannot be read"):  # which may pass
        train.check(words(data, run, "http://127.0.0.1:9/start"))
    assert not run.exists()


def test_a_padded_vocabulary_is_kept_and_a_larger_one_may_be_asked_for(data: Path, tmp_path: Path) -> None:
    model = random_model(dataclasses.replace(SHAPE, vocab_size=300))
    start = write_run(tmp_path / "start", load_tokenizer(data), model)
    config, _ = train.check(words(data, tmp_path / "run", start))
    assert config.model.vocab_size == 300
    elastic_gpt(
        "train", *words(data, tmp_path / "run", start, "--model.vocab-size=320", "--optimizer.learning-rate=1e-9")
    )
    resolved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (resolved["model"]["vocab_size"], resolved["init_from"]) == (320, str(start))
    again, _ = train.check(words(data, tmp_path / "run", start))
    assert again.model.vocab_size == 320  # a run that has begun has decided
    torch.testing.assert_close(logits(load(tmp_path / "run", CPU).model)[..., :300], logits(model), rtol=0, atol=1e-3)
