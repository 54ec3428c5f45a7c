"""export.py: transformers and nanoGPT's arithmetic compute the same with an exported model."""

import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.nn import functional as F

from model_zoo.nanogpt.engine import Request, generate
from model_zoo.nanogpt.export import main
from model_zoo.nanogpt.loading import load
from model_zoo.nanogpt.model import GPT
from prepare.tokenizer import Bytes, Characters, Tokenizer
from tests.conftest import trained_bpe
from tests.nanogpt.test_generate import write_run
from tests.nanogpt.test_loading import CPU, TINY, random_model

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="pip install transformers")


def exported(folder: Path, tokenizer: Tokenizer, model: GPT | None = None, *options: str) -> Path:
    model = model or random_model(dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size))
    run = write_run(folder / "run", tokenizer, model)
    assert main([str(run), str(folder / "out"), *options]) == 0
    return folder / "out"


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"qkv_bias": False}, {"tied_head": False}], ids=str)
def test_automodel_gives_the_same_logits_and_200_tokens_of_greedy_text(tmp_path: Path, changes: dict) -> None:
    model = random_model(dataclasses.replace(TINY, block_size=256, **changes))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported(tmp_path, Bytes(), model)).eval()
    tokens = torch.randint(256, (2, 256), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens)
        torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-5, atol=1e-4)
    prompt = tokens[:1, :5]
    ours = list(generate(model, Request(prompt[0].tolist(), 200, temperature=0)))
    found = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=200, min_new_tokens=200, do_sample=False
    )
    assert found[0, 5:].tolist() == ours


def test_transformers_own_folder_comes_back_as_the_same_model(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = transformers.GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=4)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            load(tmp_path / "hf", CPU).model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-4
        )


def test_an_exported_folder_is_exported_again_the_same(tmp_path: Path) -> None:
    first = exported(tmp_path, trained_bpe(["the theme of thee: aaaa aaa aa " * 20], 300))
    assert load(first, CPU).step == 7
    assert main([str(first), str(tmp_path / "again")]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (first / name).read_bytes()


def nanogpt_logits(state: dict[str, torch.Tensor], arguments: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """nanoGPT's arithmetic, written from its description: erf-GELU, tied head, no bias where there is none."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, state.pop(f"{name}.weight"), state.pop(f"{name}.bias") if arguments["bias"] else None)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        bias = state.pop(f"{name}.bias") if arguments["bias"] else None
        return F.layer_norm(x, x.shape[-1:], state.pop(f"{name}.weight"), bias, 1e-5)

    x = F.embedding(tokens, state.pop("transformer.wte.weight"))
    x = x + state.pop("transformer.wpe.weight")[: tokens.size(1)]
    for layer in range(arguments["n_layer"]):
        block = f"transformer.h.{layer}"
        q, k, v = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3, -1)
        q, k, v = (part.unflatten(-1, (arguments["n_head"], -1)).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(y, f"{block}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    logits = F.linear(norm(x, "transformer.ln_f"), state.pop("lm_head.weight"))
    assert not state, f"nanoGPT has no such parameters: {sorted(state)}"
    return logits


@pytest.mark.parametrize(("activation", "close"), [("gelu", 1e-4), ("gelu_erf", 1e-6)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_nanogpt_checkpoint_has_its_names_and_computes_the_same_there_up_to_the_form_of_gelu(
    tmp_path: Path,
    bias: bool,
    activation: Literal["gelu", "gelu_erf"],
    close: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, bias=bias, activation=activation)).eval()
    folder = exported(tmp_path, Bytes(), model, "--format", "nanogpt")
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    assert checkpoint["iter_num"] == 7
    arguments = checkpoint["model_args"]
    assert arguments.keys() == {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        found = nanogpt_logits(dict(checkpoint["model"]), arguments, tokens)
        torch.testing.assert_close(found, model(tokens), rtol=0, atol=close)
        assert ("form of GELU" in capsys.readouterr().err) == (activation == "gelu")  # the note that it is nearly so
        assert torch.equal(load(folder, CPU).model(tokens), model(tokens))  # and ours reads it back to the bit


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        ("huggingface", {"head_bias": True}, "model.head_bias"),
        ("nanogpt", {"head_bias": True}, "model.head_bias"),
        ("nanogpt", {"tied_head": False}, "model.tied_head"),
        ("nanogpt", {"qkv_bias": False}, "model.qkv_bias"),
    ],
)
def test_what_the_other_program_cannot_express_is_refused_by_name_and_nothing_is_left(
    layout: str, changes: dict, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", Bytes(), random_model(dataclasses.replace(TINY, **changes)))
    assert main([str(run), str(tmp_path / "out"), "--format", layout]) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", Bytes(), random_model())
    assert main([str(run), str(run)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert (run / "config.yaml").exists()


@pytest.mark.parametrize("layout", ["huggingface", "nanogpt"])
@pytest.mark.parametrize(
    "variant", [{"positions": "rotary"}, {"norm": "rms"}, {"qk_norm": True}, {"activation": "relu2"}, {"n_kv_head": 1}]
)
def test_a_model_that_is_not_gpt2s_is_refused_by_name(
    layout: str, variant: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_model(dataclasses.replace(TINY, vocab_size=256, **variant))
    run = write_run(tmp_path / "run", Bytes(), model)
    assert main([str(run), str(tmp_path / "out"), "--format", layout]) == 2
    assert f"model.{next(iter(variant))} " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_characters_go_with_a_nanogpt_checkpoint_and_other_tokens_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(tmp_path, Characters("abc"), None, "--format", "nanogpt")
    meta = pickle.loads((folder / "meta.pkl").read_bytes())
    assert meta == {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}, "stoi": {"a": 0, "b": 1, "c": 2}}
    place = torch.load(folder / "ckpt.pt", weights_only=True)["config"]["dataset"]
    assert Path("data") / place == folder.resolve()  # as sample.py joins them
    assert f"note: sample.py finds meta.pkl while it is in {place}" in capsys.readouterr().err
    bytes_folder = exported(tmp_path / "bytes", Bytes(), None, "--format", "nanogpt")
    assert not (bytes_folder / "meta.pkl").exists()
    assert "cannot decode those of byte" in capsys.readouterr().err


NANOGPT = os.environ.get("NANOGPT", "")


@pytest.mark.skipif(not NANOGPT, reason="set NANOGPT to a checkout of github.com/karpathy/nanoGPT")
def test_nanogpts_own_sample_py_talks_with_an_exported_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    letters = "".join(map(chr, range(ord("A"), ord("Z") + 1)))
    model = GPT(dataclasses.replace(TINY, vocab_size=26, bias=False, activation="gelu_erf"))
    folder = exported(tmp_path, Characters(letters), model, "--format", "nanogpt")
    words = [
        f"--out_dir={folder}",
        "--device=cpu",
        "--num_samples=1",
        "--max_new_tokens=40",
        "--start=HELLO",
        "--top_k=1",
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "sample.py", *words], cwd=NANOGPT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"Loading meta from {folder.resolve()}/meta.pkl" in done.stdout
    answer = done.stdout.splitlines()[-2]
    prompt = torch.tensor([letters.index(letter) for letter in "HELLO"])
    block = model.config.block_size
    tokens = prompt.tolist()
    with torch.no_grad():
        while len(tokens) < 45:
            tokens.append(int(model.eval()(torch.tensor([tokens[-block:]]))[0, -1].argmax()))
    assert answer == "".join(letters[token] for token in tokens)
