"""One more token for each of several texts, with as little as possible around the matrix products.

What the model's `forward` computes with a cache, for rows of different lengths. At one token a row a product takes
microseconds, and what leads to it counts as much; so rows are vectors here and not sequences of one, and a layer's keys and
values are written in one go. dev/LOG.md has what that is worth.

Letters in comments: B rows, S slots, L layers, H heads, G heads of keys and values, T block_size, D width of a head,
E embedding, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from elastic_gpt import devices

from .attention import rotation, turn
from .model import GPT, Block

FEW = 4  # rows up to which a batch of products is faster than one, where one is slow
PARTS = 4  # products in such a batch: 2 or more are equally fast


def next_logits(model: GPT, memory: Tensor, tokens: list[int], places: list[int]) -> Tensor:
    """Logits (B,V) after one more token of each row.

    Args:
        model: in eval mode.
        memory: keys and values, (L,S,2,G,T,D), of which the first B slots are the rows'; what is computed is added.
        tokens: the new ones, B.
        places: their positions, B: how many tokens of its row each one has before it, all less than T.
    """
    config, device = model.config, memory.device
    rows, width, head_dim = len(tokens), config.n_embd, memory.size(-1)
    at, end = torch.tensor(places, device=device), max(places) + 1
    in_step = min(places) + 1 == end
    row = torch.arange(rows, device=device)
    held = None if in_step else (torch.arange(end, device=device) <= at[:, None])[:, None, None]  # Bx1x1xT
    x = model.wte.weight[torch.tensor(tokens, device=device)]  # BxE
    if model.wpe is not None:
        x = x + model.wpe.weight[at]
    turned = rotation(at[:, None], head_dim) if config.positions == "rotary" else None
    grouped = memory.size(3) != config.n_head
    for block, layer in zip(model.h, memory, strict=True):
        assert isinstance(block, Block)
        attention = block.attn
        projected = _linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)  # Bx(H+2G)D
        q = projected[:, :width].unflatten(1, (-1, 1, head_dim))  # BxHx1xD
        kv = projected[:, width:].unflatten(1, (2, -1, head_dim))  # Bx2xGxD
        if config.qk_norm:
            q, k = F.rms_norm(q, (head_dim,)), F.rms_norm(kv[:, 0], (head_dim,))
            kv = torch.stack((k, kv[:, 1]), 1)
        if turned:
            q = turn(q, *turned)
            kv = torch.stack((turn(kv[:, 0, :, None], *turned)[:, :, 0], kv[:, 1]), 1)
        if in_step:
            layer[:rows, :, :, end - 1] = kv
        else:
            layer[row, :, :, at] = kv
        k, v = layer[:rows, :, :, :end].unbind(1)  # BxGxTxD, where they lie
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=held, enable_gqa=grouped)
        x = x + _linear(y.view(rows, width), attention.out_proj.weight, attention.out_proj.bias)
        mlp = block.mlp
        inner = mlp.activate(_linear(block.ln_2(x), mlp.c_fc.weight, mlp.c_fc.bias))
        x = x + _linear(inner, mlp.c_proj.weight, mlp.c_proj.bias)
    return _linear(model.ln_f(x), model.head_weight(), model.lm_head.bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of x (B,E) and `weight` (N,E): (B,N). Few rows by the kind of product that is fast on this processor."""
    if len(x) > FEW or not devices.slow_at_few_rows(x):
        return F.linear(x, weight, bias)
    whole = len(weight) - len(weight) % PARTS
    parts = weight[:whole].view(PARTS, -1, weight.size(1))  # a quarter of the outputs each
    y = torch.bmm(parts, x.t().expand(PARTS, -1, -1)).flatten(0, 1).t()  # 4x(N/4)xB -> BxN
    if whole < len(weight):
        y = torch.cat((y, F.linear(x, weight[whole:])), 1)
    return y if bias is None else y + bias
