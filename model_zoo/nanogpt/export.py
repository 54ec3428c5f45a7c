"""Exports a trained model for other programs.

    elastic-gpt export RUN DIR                        Hugging Face: AutoModelForCausalLM and AutoTokenizer load DIR
    elastic-gpt export RUN DIR --format nanogpt       DIR/ckpt.pt, which nanoGPT's sample.py loads, and meta.pkl for characters

DIR must be new or empty. It appears whole or not at all. DIR/tokenizer has our own tokenizer, so
that generate, evaluate and serve work on DIR as they do on a run.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from elastic_gpt.checkpoint import save_tensors
from elastic_gpt.contract import TOKENIZER
from model_zoo.nanogpt.huggingface_tokenizer import tokenizer_json
from model_zoo.nanogpt.layouts import export_state, refuse_variants
from model_zoo.nanogpt.loading import Loaded, load
from model_zoo.nanogpt.model import GPTConfig
from prepare.convert import meta_pkl
from prepare.frontdoor import DONE, Parser, command, writing
from prepare.ranks import END_OF_TEXT
from prepare.tokenizer import Characters, Tokenizer
from prepare.tokens import FORMAT_VERSION, META, Meta, SplitRule, dtype_for


@command
def main(argv: Sequence[str] | None = None, prog: str = "elastic-gpt export") -> int:
    """The command; returns its exit code (prepare/frontdoor.py)."""
    options = _parser(prog).parse_args(argv)
    loaded = load(options.model, torch.device("cpu"), options.tokenizer)
    export(loaded, options.dir, options.format, options.model)
    print(f"{loaded.description}\nexported to {options.dir} for {options.format}", file=sys.stderr)
    if options.format == "nanogpt" and loaded.model.config.activation == "gelu":
        print(
            "note: nanoGPT computes the erf form of GELU, this model was trained with the tanh form: what it says there is"
            " nearly the same, not to the last digit",
            file=sys.stderr,
        )
    if loaded.tokenizer is None:
        print("warning: the model has no tokenizer here, none was exported: give --tokenizer DIR", file=sys.stderr)
    return DONE


def export(loaded: Loaded, folder: Path, layout: str, source: str) -> None:
    """Write `loaded` into the new or empty `folder`, whole or not at all.

    Raises ValueError if the layout cannot express the model, or the folder is not empty.
    """
    refuse_variants(loaded.model.config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not empty: name a new folder")
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with writing(aside):
            if layout == "huggingface":
                _huggingface(loaded, aside, source)
            else:
                _nanogpt(loaded, aside, source, folder)
            if loaded.tokenizer is not None:
                _save_tokenizer(loaded.tokenizer, aside / TOKENIZER)
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _huggingface(loaded: Loaded, folder: Path, source: str) -> None:
    config, tokenizer = loaded.model.config, loaded.tokenizer
    save_tensors(
        export_state(loaded.model.state_dict(), config, "huggingface"),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    eot_id = tokenizer.eot_id if tokenizer else None
    _write_json(folder / "config.json", huggingface_config(config, loaded.step, eot_id))
    generation = {"_from_model_config": False, "bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": eot_id}
    _write_json(folder / "generation_config.json", generation | {"do_sample": True, "temperature": 0.8})
    if tokenizer is not None:
        _write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
        special = {f"{role}_token": END_OF_TEXT for role in ("bos", "eos", "pad") if eot_id is not None}
        _write_json(folder / "special_tokens_map.json", special)
        _write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": config.block_size,
                "clean_up_tokenization_spaces": False,
                "split_special_tokens": True,  # <|endoftext|> within a text is text, as in training
                **special,
            },
        )
    (folder / "README.md").write_text(model_card(loaded, source), encoding="utf-8")


def huggingface_config(config: GPTConfig, step: int | None, eot_id: int | None) -> dict[str, Any]:
    """config.json of GPT2LMHeadModel. Biases that `config` does not have are zeros there, with the same results."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": "gelu_new" if config.activation == "gelu" else "gelu",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "torch_dtype": "float32",
        "elastic_gpt_step": step,
    }


def model_card(loaded: Loaded, source: str) -> str:
    """README.md, with what is known about the run."""
    config, tokenizer = loaded.model.config, loaded.tokenizer
    name = "none" if tokenizer is None else f"{tokenizer.name}, {tokenizer.vocab_size:,} ids"
    step = "unknown" if loaded.step is None else f"{loaded.step:,}"
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# A GPT with {loaded.model.parameter_count():,} parameters\n\n"
        "Trained with ElasticGPT and exported for Hugging Face's transformers (`GPT2LMHeadModel`).\n\n"
        f"- from: `{Path(source).name}`, after {step} updates\n"
        f"- shape: {config.n_layer} layers, {config.n_embd} wide, {config.n_head} heads,"
        f" contexts of {config.block_size:,} tokens, {config.vocab_size:,} ids\n"
        f"- tokenizer: {name}\n\n"
        "What text it was trained on, how well it does and what it must not be used for is not known to the program that\n"
        "wrote this card: add it here.\n"
    )


def _nanogpt(loaded: Loaded, folder: Path, source: str, place: Path) -> None:
    """Write into `folder`, which will be `place`."""
    config = loaded.model.config
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    if config.bias and not config.qkv_bias:
        raise ValueError(
            "model.qkv_bias is false beside other biases, which nanoGPT cannot express; export to huggingface"
        )
    checkpoint: dict[str, Any] = {
        "model": export_state(loaded.model.state_dict(), config, "nanogpt"),
        "model_args": {name: getattr(config, name) for name in names},
        "iter_num": loaded.step or 0,
        "config": {"source": Path(source).name, "activation": config.activation},
    }
    tokenizer = loaded.tokenizer
    if isinstance(tokenizer, Characters):
        characters = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
        (folder / "meta.pkl").write_bytes(meta_pkl(tokenizer.vocab_size, characters))
        checkpoint["config"]["dataset"] = str(place.resolve())
        print(
            f"note: sample.py finds meta.pkl while it is in {place.resolve()}, which ckpt.pt names; elsewhere it takes ids"
            " for GPT-2's",
            file=sys.stderr,
        )
    elif tokenizer is not None and tokenizer.name not in ("gpt2", "r50k_base"):
        print(
            f"note: sample.py takes ids for GPT-2's or for characters, and cannot decode those of {tokenizer.name}",
            file=sys.stderr,
        )
    with (folder / "ckpt.pt").open("wb") as file:  # given a path, torch would report a full disk as an error of its own
        torch.save(checkpoint, file)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Save the tokenizer as a run does: meta.json and the file that it names."""
    folder.mkdir()
    section = tokenizer.save(folder)
    dtype = dtype_for(tokenizer.vocab_size)
    rule = SplitRule("unknown", None, 0.0)
    meta = Meta(FORMAT_VERSION, dtype, tokenizer.vocab_size, section, tokenizer.eot_id, {}, [], rule, {})
    _write_json(folder / META, asdict(meta))


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


EXAMPLES = """\
examples:
  %(prog)s run exported                        for AutoModelForCausalLM and AutoTokenizer
  %(prog)s run exported --format nanogpt       exported/ckpt.pt, for nanoGPT's sample.py
"""


def _parser(prog: str) -> Parser:
    description = "Write a trained model in the form of another program."
    parser = Parser(prog=prog, description=description, epilog=EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="run directory, exported folder, nanoGPT's ckpt.pt, or a URL")
    parser.add_argument("dir", type=Path, metavar="DIR", help="new folder")
    parser.add_argument("--format", choices=("huggingface", "nanogpt"), default="huggingface", help="(huggingface)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer folder, where MODEL has none")
    return parser
