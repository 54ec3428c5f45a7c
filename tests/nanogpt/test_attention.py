"""attention.py: compared with torch's own attention, and with its definition."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo.nanogpt.attention import SHORT, KeyValueCache, MultiheadAttention

B, T, S, E, H = 3, 5, 7, 24, 4
TIGHT: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}


def twins(**settings: Any) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Ours and torch's with the same random weights, biases included."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, batch_first=True, **settings)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MultiheadAttention(E, H, **settings)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def masks(keys: int) -> dict[str, dict[str, Tensor]]:
    """Masks in torch's meaning: True is left out. No query is left without a key: torch answers NaN to that."""
    padding = torch.zeros(B, keys, dtype=torch.bool)
    padding[0, -2:] = padding[2, -1] = True
    some = torch.rand(T, keys) < 0.3
    some[:, 0] = False
    each = torch.rand(B * H, T, keys) < 0.3
    each[:, :, 0] = False
    number = torch.randn(T, keys)
    return {
        "none": {},
        "bool": {"attn_mask": some},
        "float": {"attn_mask": number},
        "per head": {"attn_mask": each},
        "float per head": {"attn_mask": torch.randn(B * H, T, keys)},
        "padding": {"key_padding_mask": padding},
        "bool and padding": {"attn_mask": some, "key_padding_mask": padding},
        "causal": {"attn_mask": torch.ones(T, keys, dtype=torch.bool).triu(1)},
    }


def assert_same(ours: nn.Module, theirs: nn.Module, y: Tensor, z: Tensor, inputs: list[Tensor]) -> None:
    """Outputs are equal, and so are the gradients of all parameters and inputs."""
    torch.testing.assert_close(y, z, **TIGHT)
    weight = torch.randn_like(y)
    names = [name for name, _ in theirs.named_parameters()]
    mine = torch.autograd.grad((y * weight).sum(), [*map(ours.get_parameter, names), *inputs])
    reference = torch.autograd.grad((z * weight).sum(), [*map(theirs.get_parameter, names), *inputs])
    for name, a, b in zip([*names, *map(str, range(len(inputs)))], mine, reference, strict=True):
        torch.testing.assert_close(a, b, **TIGHT, msg=f"gradient of {name}")


@pytest.mark.parametrize("mask", masks(T))
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_is_torchs_forward_and_backward(mask: str, bias: bool) -> None:
    ours, theirs = twins(bias=bias)
    x = torch.randn(B, T, E, requires_grad=True)
    arguments = masks(T)[mask]
    assert_same(ours, theirs, ours(x, **arguments), theirs(x, x, x, need_weights=False, **arguments)[0], [x])


@pytest.mark.parametrize("mask", masks(S))
def test_cross_attention_is_torchs_forward_and_backward(mask: str) -> None:
    ours, theirs = twins()
    x, memory = (torch.randn(B, n, E, requires_grad=True) for n in (T, S))
    arguments = masks(S)[mask]
    y, z = ours(x, memory, **arguments), theirs(x, memory, memory, need_weights=False, **arguments)[0]
    assert_same(ours, theirs, y, z, [x, memory])


@pytest.mark.parametrize("widths", [{}, {"kdim": 10, "vdim": 14}, {"kdim": 10}])
def test_query_key_and_value_of_three_sources_and_widths_are_torchs(widths: dict[str, int]) -> None:
    ours, theirs = twins(**widths)
    x = torch.randn(B, T, E, requires_grad=True)
    key = torch.randn(B, S, widths.get("kdim", E), requires_grad=True)
    value = torch.randn(B, S, widths.get("vdim", E), requires_grad=True)
    assert_same(ours, theirs, ours(x, key, value), theirs(x, key, value, need_weights=False)[0], [x, key, value])


@pytest.mark.parametrize("keys", [T, S])
@pytest.mark.parametrize("extra", ["none", "bool", "float", "padding"])
def test_is_causal_alone_or_beside_a_mask_hides_the_future(keys: int, extra: str) -> None:
    ours, theirs = twins()
    x = torch.randn(B, T, E, requires_grad=True)
    memory = x if keys == T else torch.randn(B, S, E, requires_grad=True)
    arguments = masks(keys)[extra]
    future = torch.ones(T, keys).triu(1).mul(-1e9)  # a finite number, so that torch takes it beside a bool padding mask
    mask = arguments.get("attn_mask", torch.zeros(T, keys))
    mask = mask.float().mul(-1e9) if mask.dtype == torch.bool else mask
    y = ours(x, memory, is_causal=True, **arguments)
    padding = arguments.get("key_padding_mask", torch.zeros(B, keys, dtype=torch.bool)).float() * -1e9
    z = theirs(x, memory, memory, need_weights=False, attn_mask=mask + future, key_padding_mask=padding)[0]
    assert_same(ours, theirs, y, z, [x] if memory is x else [x, memory])


def test_attention_is_its_definition() -> None:
    ours, _ = twins()
    x = torch.randn(B, T, E)
    q, k, v = (
        (x @ w.T + b).view(B, T, H, E // H).transpose(1, 2)
        for w, b in zip(ours.in_proj_weight.chunk(3), ours.in_proj_bias.chunk(3), strict=True)
    )
    scores = (q @ k.mT) / math.sqrt(E // H)
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    y = ours.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, E))
    torch.testing.assert_close(ours(x, is_causal=True), y, **TIGHT)


@pytest.mark.parametrize("chunks", [[8], [1] * 8, [5, 1, 2], [3, 3, 1, 1]])
def test_a_cache_filled_in_any_chunks_gives_what_one_pass_gives(chunks: list[int]) -> None:
    ours, _ = twins()
    x = torch.randn(B, 8, E)
    cache = KeyValueCache(max_length=9)
    y = torch.cat([ours(part, is_causal=True, cache=cache) for part in x.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(y, ours(x, is_causal=True), **TIGHT)
    assert cache.length == 8


def test_a_cache_of_cross_attention_projects_the_memory_once_and_does_not_grow() -> None:
    ours, _ = twins()
    x, memory = torch.randn(B, T, E), torch.randn(B, S, E)
    expected = ours(x, memory)
    cache = KeyValueCache(S)
    for i in range(T):
        # Another memory after the first step changes nothing: it is not looked at.
        y = ours(x[:, i : i + 1], memory if i == 0 else memory + 1, cache=cache)
        torch.testing.assert_close(y, expected[:, i : i + 1], **TIGHT)
    assert cache.length == S


def test_a_cache_takes_its_room_once() -> None:
    cache = KeyValueCache(4)
    k, _ = cache.append(torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 3))
    place = k.data_ptr()
    k, v = cache.append(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3))
    assert k.data_ptr() == place
    assert k.shape == v.shape == (1, 2, 4, 3)
    with pytest.raises(ValueError, match="5 tokens do not fit a key-value cache of 4"):
        cache.append(torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3))


def test_dropout_acts_in_training_only_and_follows_torchs_seed() -> None:
    attention = MultiheadAttention(E, H, dropout=0.5)
    x = torch.randn(B, T, E)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return attention(x, is_causal=True)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    attention.eval()
    assert torch.equal(run(1), run(2))


def test_the_output_bias_can_be_chosen_apart() -> None:
    names = {name for name, _ in MultiheadAttention(E, H, bias=False, out_bias=True).named_parameters()}
    assert names == {"in_proj_weight", "out_proj.weight", "out_proj.bias"}


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="embed_dim 24 is not a multiple of num_heads 5"):
        MultiheadAttention(24, 5)


def test_rotary_positions_are_refused_in_cross_attention() -> None:
    module = MultiheadAttention(8, 2, rotary=True)
    with pytest.raises(ValueError, match="in self-attention only"):
        module(torch.randn(1, 3, 8), torch.randn(1, 4, 8))


@pytest.mark.parametrize(("options", "message"), [({"num_kv_heads": 3}, "not a multiple of num_kv_heads 3")])
def test_heads_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiheadAttention(8, 4, **options)


@pytest.mark.parametrize(("tokens", "dtype"), [(8, torch.float32), (SHORT + 1, torch.bfloat16)])
def test_short_attention_on_a_cpu_is_float32_whatever_the_products_are(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    types: list[torch.dtype] = []
    original = F.scaled_dot_product_attention

    def spied(q: Tensor, *rest: Any, **more: Any) -> Tensor:
        types.append(q.dtype)
        return original(q, *rest, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
    attention = MultiheadAttention(16, 2)
    with torch.autocast("cpu", torch.bfloat16):
        output = attention(torch.randn(1, tokens, 16), is_causal=True)
    assert types == [dtype]
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("tokens", [4, SHORT + 1])
def test_a_bfloat16_module_takes_its_own_kind_of_mask(tokens: int) -> None:
    attention = MultiheadAttention(16, 2).bfloat16()
    x, mask = torch.randn(1, tokens, 16, dtype=torch.bfloat16), torch.randn(tokens, tokens, dtype=torch.bfloat16)
    expected = attention.float()(x.float(), attn_mask=mask.float())
    torch.testing.assert_close(attention.bfloat16()(x, attn_mask=mask).float(), expected, rtol=0.05, atol=0.05)
