"""Converts weights between three layouts: ours, Hugging Face's GPT-2 and nanoGPT's. Tensors in, tensors out; no files.

Hugging Face keeps the matrices of a block as (in, out), its "Conv1D"; nanoGPT and we as (out, in),
torch's Linear. Both put `transformer.` before all names but that of the head, and both have
`attn.c_attn` and `attn.c_proj` where we have torch's names.
"""

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from .model import GPT, GPTConfig

Layout = Literal["huggingface", "nanogpt"]

_NAMES = {
    "attn.in_proj_weight": "attn.c_attn.weight",
    "attn.in_proj_bias": "attn.c_attn.bias",
    "attn.out_proj.weight": "attn.c_proj.weight",
    "attn.out_proj.bias": "attn.c_proj.bias",
}
_OURS = {theirs: ours for ours, theirs in _NAMES.items()}
_BLOCK = re.compile(r"h\.\d+\.(?P<inside>.+)")
_MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # the causal mask, which old files contain
_MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class DoesNotFit(ValueError):
    """A layout cannot express something, or a file lacks it. The message has the names and the cure."""


def export_state(state: Mapping[str, Tensor], config: GPTConfig, layout: Layout) -> dict[str, Tensor]:
    """Our state dict with the names and shapes of `layout`. Biases that only `layout` has are zero.

    Raises DoesNotFit for what `layout` cannot express.
    """
    if config.head_bias:
        raise DoesNotFit(f"model.head_bias: a GPT-2 of {layout} has no bias on its logits, so it cannot be exported")
    if layout == "nanogpt" and not config.tied_head:
        raise DoesNotFit(
            "model.tied_head is false: nanoGPT's head is always the token embedding; export to huggingface"
        )
    zeros = layout == "huggingface" or config.bias
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        inside = _BLOCK.fullmatch(name)
        renamed = name
        if inside and inside["inside"] in _NAMES:
            renamed = name.replace(inside["inside"], _NAMES[inside["inside"]])
        if layout == "huggingface" and renamed.endswith(_MATRICES) and inside:
            tensor = tensor.t()
        renamed = renamed if name.startswith("lm_head.") else f"transformer.{renamed}"
        found[renamed] = tensor.contiguous()
        bias = renamed.removesuffix("weight") + "bias"
        if zeros and renamed.endswith(".weight") and (inside or name.startswith("ln_f")):
            width = tensor.size(-1) if layout == "huggingface" or tensor.dim() == 1 else tensor.size(0)
            found.setdefault(bias, tensor.new_zeros(width))
    if layout == "nanogpt":
        found["lm_head.weight"] = found["transformer.wte.weight"]
    return found


def import_state(found: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """A state dict of `layout` with our names, in float32.

    Leaves out the masks in old files, and the prefix that torch.compile puts before names.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in found.items():
        name = name.removeprefix("_orig_mod.").removeprefix("transformer.")
        if _MASKS.fullmatch(name):
            continue
        inside = _BLOCK.fullmatch(name)
        if layout == "huggingface" and inside and inside["inside"] in _MATRICES:
            tensor = tensor.t()
        if inside and inside["inside"] in _OURS:
            name = name.replace(inside["inside"], _OURS[inside["inside"]])
        state[name] = tensor.float().contiguous()
    return state


VARIANTS = ("positions", "norm", "qk_norm", "activation", "n_kv_head")
"""What GPT-2 has in one way only, but for the two forms of GELU, which are the same to three digits."""
GELUS = ("gelu", "gelu_erf")


def _others(one: GPTConfig, other: GPTConfig) -> list[str]:
    """The variants that differ."""
    differ = [name for name in VARIANTS if getattr(one, name) != getattr(other, name)]
    if {one.activation, other.activation} <= set(GELUS):
        differ = [name for name in differ if name != "activation"]
    return differ


def refuse_variants(config: GPTConfig) -> None:
    """Raises ValueError, with the names, for a model that differs from GPT-2, which other formats cannot express."""
    if other := [f"model.{name} {getattr(config, name)}" for name in _others(config, GPTConfig())]:
        raise ValueError(
            f"{', '.join(other)}: GPT-2 has no such thing, and the formats of export are for GPT-2's models"
        )


def fit(state: Mapping[str, Tensor], have: GPTConfig, want: GPTConfig) -> dict[str, Tensor]:
    """Turns our state dict of a model `have` into one of a model `want`, which may have fewer positions and more ids.

    Embeddings (and head rows) of new ids are the mean of the others, so that none stands out.
    Biases that only `want` has are zero. Raises DoesNotFit that names everything else that differs.
    """
    misfits = [
        f"model.{name} is {getattr(want, name)}, there it is {getattr(have, name)}"
        for name in ("n_layer", "n_head", "n_embd", "tied_head")
        if getattr(want, name) != getattr(have, name)
    ]
    misfits += [
        f"model.{name} is {getattr(want, name)}, there it is {getattr(have, name)}" for name in _others(want, have)
    ]
    if want.block_size > have.block_size:
        misfits.append(
            f"model.block_size is {want.block_size}, there are {have.block_size} positions: it may only shrink"
        )
    if want.vocab_size < have.vocab_size:
        misfits.append(f"model.vocab_size is {want.vocab_size}, less than the {have.vocab_size} ids there")
    for name in ("bias", "qkv_bias", "head_bias"):
        if getattr(have, name) and not getattr(want, name):
            misfits.append(f"model.{name} is false, and there are such biases")
    if misfits:
        raise DoesNotFit("; ".join(misfits))
    fitted = dict(state)
    if "wpe.weight" in fitted:  # rotary positions have no parameters
        fitted["wpe.weight"] = fitted["wpe.weight"][: want.block_size].contiguous()
    with torch.device("meta"):
        shapes = GPT(want).state_dict()
    for name, tensor in shapes.items():
        if name.endswith("bias") and name not in fitted:
            fitted[name] = torch.zeros(tensor.shape)
    more = want.vocab_size - have.vocab_size
    for name in ("wte.weight", "lm_head.weight"):
        if more and name in fitted:
            fitted[name] = torch.cat((fitted[name], fitted[name].mean(0, keepdim=True).expand(more, -1)))
    if more and "lm_head.bias" in state:
        fitted["lm_head.bias"] = torch.cat((state["lm_head.bias"], state["lm_head.bias"].new_zeros(more)))
    return fitted
