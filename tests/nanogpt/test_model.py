"""model.py: compared with the formulas of GPT-2, and its parameter and operation counts."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo.nanogpt.model import GPT, GPTConfig

TINY = GPTConfig(vocab_size=61, block_size=16, n_layer=3, n_head=4, n_embd=32)


def tiny(seed: int = 0, **changes: Any) -> GPT:
    """A small model whose weights are large enough, and biases other than 0, for an error anywhere to show."""
    torch.manual_seed(seed)
    model = GPT(replace(TINY, **changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def some_tokens(model: GPT, length: int, batch: int = 2) -> Tensor:
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def gpt2(state: dict[str, Tensor], tokens: Tensor, heads: int, layers: int) -> Tensor:
    """GPT-2's logits, slowly, from the formulas of Hugging Face's modeling_gpt2.py; biases that are absent are 0."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}weight"].T + state.get(f"{name}bias", 0)

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state.get(f"{name}.bias", 0)

    def gelu_new(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = state["wte.weight"][tokens] + state["wpe.weight"][: tokens.size(1)]
    for i in range(layers):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.in_proj_").chunk(3, dim=-1)
        parts = []
        for qh, kh, vh in zip(*(part.chunk(heads, dim=-1) for part in (q, k, v)), strict=True):
            scores = qh @ kh.mT / math.sqrt(qh.size(-1))
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
            parts.append(scores.softmax(-1) @ vh)
        x = x + linear(torch.cat(parts, dim=-1), f"h.{i}.attn.out_proj.")
        x = x + linear(gelu_new(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc.")), f"h.{i}.mlp.c_proj.")
    head = state.get("lm_head.weight", state["wte.weight"])
    return norm(x, "ln_f") @ head.T + state.get("lm_head.bias", 0)


@pytest.mark.parametrize(
    ("count", "config"),
    [
        (124_439_808, GPTConfig()),
        (163_059_793, GPTConfig(tied_head=False, head_bias=True, qkv_bias=False)),
        (
            8_193_457,
            GPTConfig(
                vocab_size=50257,
                block_size=100,
                n_embd=78,
                n_head=13,
                n_layer=4,
                tied_head=False,
                head_bias=True,
                qkv_bias=False,
            ),
        ),
    ],
)
def test_parameter_counts_are_exact(count: int, config: GPTConfig) -> None:
    with torch.device("meta"):
        assert GPT(config).parameter_count() == count


@pytest.mark.parametrize(
    "changes",
    [{}, {"bias": False}, {"qkv_bias": False}, {"tied_head": False, "head_bias": True}, {"head_bias": True}],
)
def test_logits_are_gpt2s(changes: dict[str, bool]) -> None:
    model = tiny(**changes)
    tokens = some_tokens(model, 16)
    expected = gpt2(model.state_dict(), tokens, TINY.n_head, TINY.n_layer)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [61, 9000])  # from 8192 on, the loss comes in chunks where torch can do so
@pytest.mark.parametrize("changes", [{}, {"tied_head": False, "head_bias": True}])
def test_the_loss_is_the_sum_over_all_targets_with_its_gradients(vocab_size: int, changes: dict[str, bool]) -> None:
    model = tiny(vocab_size=vocab_size, block_size=150, **changes)
    tokens, targets = some_tokens(model, 150), some_tokens(model, 150).flip(1)
    loss = model(tokens, targets)
    each = -model(tokens).log_softmax(-1).gather(-1, targets[..., None])
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, each.sum())
    parameters = dict(model.named_parameters())
    mine = torch.autograd.grad(loss / 300, list(parameters.values()))
    reference = torch.autograd.grad(each.mean(), list(parameters.values()))
    for name, a, b in zip(parameters, mine, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=f"gradient of {name}")


@pytest.mark.parametrize("vocab_size", [61, 9000])
def test_the_loss_is_float32_whatever_the_products_are(vocab_size: int) -> None:
    model = tiny(vocab_size=vocab_size)
    tokens = some_tokens(model, 16)
    exact = model(tokens, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(tokens, tokens)
    low = model.bfloat16()(tokens, tokens)
    for loss in (mixed, low):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)


@pytest.mark.parametrize("chunks", [[16], [1] * 16, [7, 1, 1, 7], [4, 4, 4, 4]])
def test_a_cache_filled_in_any_chunks_gives_the_logits_of_one_pass(chunks: list[int]) -> None:
    model = tiny().eval()
    tokens = some_tokens(model, 16)
    expected = model(tokens)
    cache = model.new_cache()
    parts = [model(part, cache=cache) for part in tokens.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_no_token_sees_a_later_one() -> None:
    model = tiny().eval()
    tokens = some_tokens(model, 12)
    other = tokens.clone()
    other[:, 7] = (other[:, 7] + 1) % TINY.vocab_size
    a, b = model(tokens), model(other)
    assert torch.equal(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7:], b[:, 7:])


def test_more_tokens_than_the_block_are_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="17 tokens are more than block_size 16"):
        model(some_tokens(model, 17))
    cache = model.new_cache()
    model(some_tokens(model, 16), cache=cache)
    with pytest.raises(ValueError, match="17 tokens are more than block_size 16"):
        model(some_tokens(model, 1), cache=cache)


def test_a_fresh_model_starts_as_gpt2_did() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=1000, block_size=256, n_layer=8, n_head=4, n_embd=128, head_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".ln_" in name or name.startswith("ln_"):
            assert (parameter == 1).all(), name
        else:
            added = name.endswith(("attn.out_proj.weight", "mlp.c_proj.weight"))
            deviation = 0.02 / math.sqrt(16) if added else 0.02
            assert parameter.std().item() == pytest.approx(deviation, rel=0.03), name
            assert abs(parameter.mean().item()) < 4 * deviation / math.sqrt(parameter.numel()), name
    tokens = some_tokens(model, 256, batch=4)
    assert model(tokens, tokens.flip(0)).item() / tokens.numel() == pytest.approx(math.log(1000), rel=0.01)


def test_the_same_seed_draws_the_same_model_and_dropout() -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = GPT(replace(TINY, dropout=0.2))
        tokens = some_tokens(model, 16)
        return model(tokens, tokens)

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))


def test_dropout_leaves_evaluation_alone() -> None:
    model, plain = tiny(dropout=0.3), tiny()
    tokens = some_tokens(model, 16)
    assert not torch.allclose(model(tokens), plain(tokens))
    assert torch.equal(model.eval()(tokens), plain(tokens))


def test_a_tied_head_is_saved_once_and_moves_with_the_embedding() -> None:
    model = tiny()
    assert not [name for name in model.state_dict() if name.startswith("lm_head")]
    places = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert len(set(places)) == len(places)  # safetensors refuses tensors that share memory
    before = model(some_tokens(model, 4))
    with torch.no_grad():
        model.wte.weight[5] *= 3
    after = model(torch.where(some_tokens(model, 4) == 5, 6, some_tokens(model, 4)))
    assert not torch.allclose(before[..., 5], after[..., 5])


def test_each_parameter_is_in_one_decay_group_by_its_dimensions() -> None:
    model = tiny(tied_head=False, head_bias=True)
    decay, rest = model.decay_groups(0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    grouped = [id(p) for group in (decay, rest) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert all(p.dim() >= 2 for p in decay["params"])
    assert all(p.dim() == 1 for p in rest["params"])


def test_flops_per_token_count_what_is_multiplied() -> None:
    with torch.device("meta"):
        tied, untied = GPT(GPTConfig()), GPT(GPTConfig(tied_head=False))
    assert tied.flops_per_token() == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert untied.flops_per_token() == tied.flops_per_token()


@pytest.mark.parametrize("vocab_size", [61, 9000])
def test_training_compiles_in_one_graph(vocab_size: int) -> None:
    model = tiny(vocab_size=vocab_size, dropout=0.1)
    tokens = some_tokens(model, 16)
    # aot_eager traces the backward pass too, as the real compiler does, without its minute of work.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.manual_seed(0)
    loss = compiled(tokens, tokens)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.manual_seed(0)
    assert loss.item() == pytest.approx(model(tokens, tokens).item(), rel=0.1)


def test_a_block_is_torchs_encoder_layer() -> None:
    model = tiny()
    block = model.h[1]
    theirs = nn.TransformerEncoderLayer(32, 4, 128, 0.0, lambda x: F.gelu(x, approximate="tanh"), norm_first=True)
    theirs.self_attn.batch_first = True
    names = {"ln_1": "norm1", "ln_2": "norm2", "attn": "self_attn", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
    state = {}
    for name, tensor in block.state_dict().items():
        start = next(start for start in names if name.startswith(start))
        state[names[start] + name.removeprefix(start)] = tensor
    theirs.load_state_dict(state)
    x = torch.randn(2, 9, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    torch.testing.assert_close(block(x), theirs(x, src_mask=mask, is_causal=True), rtol=1e-4, atol=1e-5)


MODERN: dict[str, Any] = {"positions": "rotary", "norm": "rms", "qk_norm": True, "activation": "relu2", "n_kv_head": 2}
VARIANTS = [
    MODERN,
    *({name: value} for name, value in MODERN.items()),
    {**MODERN, "activation": "swiglu", "bias": False},
]


def modern(state: dict[str, Tensor], tokens: Tensor, config: GPTConfig) -> Tensor:
    """The logits of MODERN with squared ReLU or SwiGLU, slowly, from the formulas of the papers; position by position."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}weight"].T + state.get(f"{name}bias", 0)

    def norm(x: Tensor, eps: float) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    width = config.n_embd // config.n_head

    def turned(x: Tensor) -> Tensor:  # (B,T,D): pairs as complex numbers, times e^(ip/10000^(2i/D))
        speed = 10000.0 ** (-torch.arange(0, width, 2) / width)
        angles = torch.arange(x.size(1))[:, None] * speed
        y = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((y.real, y.imag), dim=-1)

    x = state["wte.weight"][tokens]
    for i in range(config.n_layer):
        inside = norm(x, 1e-5) * state[f"h.{i}.ln_1.weight"]
        kv = config.n_kv_head * width
        q, k, v = linear(inside, f"h.{i}.attn.in_proj_").split((config.n_embd, kv, kv), dim=-1)
        parts = []
        for head in range(config.n_head):
            group = head * config.n_kv_head // config.n_head
            qh, kh, vh = (y.split(width, dim=-1)[n] for y, n in ((q, head), (k, group), (v, group)))
            qh, kh = turned(norm(qh, torch.finfo(torch.float32).eps)), turned(norm(kh, torch.finfo(torch.float32).eps))
            scores = qh @ kh.mT / math.sqrt(width)
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
            parts.append(scores.softmax(-1) @ vh)
        x = x + linear(torch.cat(parts, dim=-1), f"h.{i}.attn.out_proj.")
        inside = linear(norm(x, 1e-5) * state[f"h.{i}.ln_2.weight"], f"h.{i}.mlp.c_fc.")
        if config.activation == "relu2":
            inside = inside.clamp(min=0) ** 2
        else:
            gate, inside = inside.chunk(2, dim=-1)
            inside = gate * gate.sigmoid() * inside
        x = x + linear(inside, f"h.{i}.mlp.c_proj.")
    return norm(x, 1e-5) * state["ln_f.weight"] @ state["wte.weight"].T


@pytest.mark.parametrize(
    "changes", [MODERN, {**MODERN, "activation": "swiglu", "bias": False}, {**MODERN, "n_kv_head": 1}]
)
def test_the_modern_variants_logits_are_those_of_the_formulas(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    tokens = some_tokens(model, 16)
    torch.testing.assert_close(model(tokens), modern(model.state_dict(), tokens, model.config), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", VARIANTS)
def test_each_variant_generates_with_a_cache_trains_and_sees_no_later_token(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    tokens = some_tokens(model, 16)
    expected = model.eval()(tokens)
    cache = model.new_cache()
    parts = [model(part, cache=cache) for part in tokens.split([7, 1, 1, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model(tokens[:, :9]), expected[:, :9], rtol=1e-3, atol=1e-4)
    model(tokens, tokens).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_rotary_positions_know_distances_only() -> None:
    attention = tiny(**MODERN).h[0].attn
    x = torch.randn(2, 5, 32)
    for start in (0, 3, 700):
        q, k, v = attention._project(x, x, x, start)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        here = attention.out_proj(y.transpose(1, 2).flatten(2))
        torch.testing.assert_close(here, attention(x, is_causal=True), rtol=1e-3, atol=1e-3)


def test_a_config_without_the_variants_fields_is_gpt2() -> None:
    with torch.device("meta"):
        old = GPT(TINY).state_dict()
        named = GPT(replace(TINY, positions="learned", norm="layer", activation="gelu", n_kv_head=TINY.n_head))
    assert {name: tensor.shape for name, tensor in old.items()} == {
        name: tensor.shape for name, tensor in named.state_dict().items()
    }
