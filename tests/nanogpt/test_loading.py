"""loading.py: models in all places and formats, and what is not a model."""

import dataclasses
import json
import pickle
import shutil
import warnings
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from elastic_gpt.checkpoint import Checkpoints
from model_zoo.nanogpt.layouts import export_state
from model_zoo.nanogpt.loading import build, load, read_weights
from model_zoo.nanogpt.model import GPT, GPTConfig
from model_zoo.nanogpt.vocabulary import vocabulary_fingerprint
from prepare.tokenizer import Bytes, Characters
from tests.nanogpt.test_generate import write_run

CPU = torch.device("cpu")
TINY = GPTConfig(256, block_size=16, n_layer=2, n_head=2, n_embd=8)


def random_model(config: GPTConfig = TINY) -> GPT:
    torch.manual_seed(0)
    model = GPT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def logits(model: GPT) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None])


def huggingface_folder(folder: Path, model: GPT, **fields: object) -> Path:
    """What transformers saves of a GPT-2, for tests that need no transformers."""
    folder.mkdir(parents=True)
    save_file(export_state(model.state_dict(), model.config, "huggingface"), folder / "model.safetensors")
    config = model.config
    shape = {"vocab_size": config.vocab_size, "n_positions": config.block_size, "n_embd": config.n_embd}
    shape |= {"n_layer": config.n_layer, "n_head": config.n_head, "tie_word_embeddings": config.tied_head}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | shape | fields))
    return folder


def test_a_run_gives_its_newest_checkpoint_its_tokenizer_and_where_newer_ones_will_be(tmp_path: Path) -> None:
    model = random_model()
    run = write_run(tmp_path / "run", Bytes(), model, step=3)
    loaded = load(run, CPU)
    assert (loaded.step, loaded.checkpoints) == (3, str(run / "checkpoints"))
    assert isinstance(loaded.tokenizer, Bytes)
    assert not loaded.model.training
    assert torch.equal(logits(loaded.model), logits(model))
    assert "step 3" in loaded.description


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"qkv_bias": False}, {"tied_head": False}], ids=str)
def test_hugging_face_folders_compute_the_same_whatever_biases_they_lack(tmp_path: Path, changes: dict) -> None:
    model = random_model(dataclasses.replace(TINY, **changes))
    loaded = load(huggingface_folder(tmp_path / "hf", model), CPU)
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=0, atol=1e-6)
    assert loaded.model.config.tied_head == model.config.tied_head


def test_old_bin_files_and_nanogpts_checkpoints_are_read_and_their_masks_left_out(tmp_path: Path) -> None:
    model = random_model()
    folder = huggingface_folder(tmp_path / "hf", model)
    state = export_state(model.state_dict(), TINY, "huggingface")
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(logits(load(folder, CPU).model), logits(model))

    inside = export_state(model.state_dict(), TINY, "nanogpt")
    shape = {name: getattr(TINY, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")}
    checkpoint = {"model_args": shape | {"dropout": 0.1}, "iter_num": 5}
    erf = GPT(dataclasses.replace(TINY, activation="gelu_erf")).eval()  # what nanoGPT computes
    erf.load_state_dict(model.state_dict())
    torch.save(checkpoint | {"model": {f"_orig_mod.{k}": v for k, v in inside.items()}}, tmp_path / "ckpt.pt")
    for place in (tmp_path, tmp_path / "ckpt.pt"):
        loaded = load(place, CPU)
        assert torch.equal(logits(loaded.model), logits(erf))
        assert loaded.step == 5


def test_a_file_that_holds_code_is_refused_and_nothing_in_it_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "was-run",)

    torch.save({"model": Evil()}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="holds code"):
        load(tmp_path / "ckpt.pt", CPU)
    assert not (tmp_path / "was-run").exists()
    for garbage in ("steps: {a: 1}\n3: 4\n? [x]\n: y\n", "", "some text", "(" * 5000):
        (tmp_path / "ckpt.pt").write_text(garbage)
        with pytest.raises(ValueError, match="damaged"):
            load(tmp_path / "ckpt.pt", CPU)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"n_inner": 5}, "n_inner=5"),
        ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon=0.001"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"n_embd": "wide"}, "config.json describes no GPT-2"),
        ({"n_layer": 3}, "not the model in its configuration"),
    ],
)
def test_what_this_model_cannot_express_is_refused_by_name(tmp_path: Path, fields: dict, words: str) -> None:
    folder = huggingface_folder(tmp_path / "hf", random_model(), **fields)
    with pytest.raises(ValueError, match=words):
        load(folder, CPU)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_in_every_form_with_the_tensors_name(
    tmp_path: Path, value: float
) -> None:
    model = random_model()
    with torch.no_grad():
        model.wpe.weight[3, 3] = value
    inside = export_state(model.state_dict(), TINY, "nanogpt")
    shape = {name: getattr(TINY, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")}
    torch.save({"model_args": shape, "model": inside}, tmp_path / "ckpt.pt")
    run = write_run(tmp_path / "run", Bytes(), model)
    for place in (run, huggingface_folder(tmp_path / "hf", model), tmp_path / "ckpt.pt"):
        with pytest.raises(ValueError, match=r"broken model, wpe\.weight is not finite"):
            load(place, CPU)


def test_a_tokenizer_of_another_vocabulary_is_refused_though_it_has_as_many_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_model(dataclasses.replace(TINY, vocab_size=3))
    run = write_run(tmp_path / "run", Characters("abc"), model)
    same = write_run(tmp_path / "same", Characters("cab"), model) / "tokenizer"
    other = write_run(tmp_path / "other", Characters("xyz"), model) / "tokenizer"
    assert load(run, CPU, same).tokenizer is not None
    with pytest.raises(ValueError, match="another vocabulary than the model was trained with: leave --tokenizer out"):
        load(run, CPU, other)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(f"{config}tokenizer_fingerprint: {vocabulary_fingerprint(Characters('abc'))}\n")
    shutil.rmtree(run / "tokenizer")
    assert load(run, CPU, same).tokenizer is not None
    with pytest.raises(ValueError, match=r"another vocabulary .* name the folder of the data"):
        load(run, CPU, other)
    assert capsys.readouterr().err == ""
    (run / "config.yaml").write_text(config)
    load(run, CPU, other)
    assert "does not say which vocabulary it was trained with" in capsys.readouterr().err


def test_broken_folders_get_one_line(tmp_path: Path) -> None:
    folder = huggingface_folder(tmp_path / "hf", random_model())
    (folder / "model.safetensors").write_bytes(b"not this")
    with pytest.raises(ValueError, match="cannot read the weights"):
        load(folder, CPU)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="weights are missing"):
        load(folder, CPU)
    with pytest.raises(ValueError, match="no run directory"):
        load(tmp_path / "nowhere", CPU)


def test_a_digest_is_of_the_parameters_and_not_of_the_file(tmp_path: Path) -> None:
    model = random_model()
    run = write_run(tmp_path / "run", Bytes(), model)
    folder = huggingface_folder(tmp_path / "hf", model)
    assert read_weights(run).digest() == read_weights(folder).digest()
    with torch.no_grad():
        model.wte.weight[0, 0] += 1e-6
    other = write_run(tmp_path / "other", Bytes(), model)
    assert read_weights(other).digest() != read_weights(run).digest()
    assert build(read_weights(run)).parameter_count() == model.parameter_count()


@pytest.mark.usefixtures("s3_server")
def test_a_run_on_an_object_store_is_loaded_by_its_url(tmp_path: Path) -> None:
    model = random_model()
    run = write_run(tmp_path / "run", Bytes(), model, step=9)
    (run / "checkpoints" / Checkpoints.name(11)).mkdir()  # half-written: no manifest
    fsspec.filesystem("s3", skip_instance_cache=True).put(str(run), "bucket/loading", recursive=True)
    loaded = load("s3://bucket/loading", CPU)
    assert (loaded.step, loaded.checkpoints) == (9, "s3://bucket/loading/checkpoints")
    assert torch.equal(logits(loaded.model), logits(model))
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    store.rm(f"bucket/loading/checkpoints/{Checkpoints.name(9)}", recursive=True)
    with pytest.raises(
        ValueError, match="no checkpoint in s3://bucket/loading/checkpoints, where s3://bucket/loading keeps"
    ):
        load("s3://bucket/loading", CPU)  # the address, and not the copy that was looked into
    with pytest.raises(ValueError, match="s3://bucket/nowhere cannot be read"):
        load("s3://bucket/nowhere", CPU)
    with pytest.raises(ValueError, match="nosuch://x cannot be opened"):
        load("nosuch://x", CPU)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_what_torch_refuses_is_told_without_its_advice_to_run_what_is_in_it(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "ckpt.pt"
    path.write_bytes(pickle.dumps({"model": print}, protocol=protocol))
    with (
        warnings.catch_warnings(record=True) as warned,
        pytest.raises(ValueError, match="holds code, which is not run") as error,
    ):
        load(path, torch.device("cpu"), None)
    assert warned == []
    assert "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)
