"""Compares our multi-head attention with torch.nn.MultiheadAttention and with the textbook formula, in turn in one run.

    python benchmarks/attention.py [--device cuda]

Prints the ratio of the other's time to ours (above 1: ours is faster), median of interleaved pairs;
causal self-attention and cross-attention, forward alone and with backward. All three have the same
weights, and their outputs are compared first.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from model_zoo.nanogpt.attention import MultiheadAttention

SHAPES = [(8, 256, 384, 6), (4, 1024, 768, 12), (12, 64, 128, 4)]  # batch, tokens, embedding, heads
ROUNDS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads;"
        f" ratio to ours of torch / textbook, median of {ROUNDS}"
    )
    for shape in SHAPES:
        batch, tokens, width, heads = shape
        x = torch.randn(batch, tokens, width, device=device, requires_grad=True)
        causal = nn.Transformer.generate_square_subsequent_mask(tokens, device=torch.device(device))
        theirs = nn.MultiheadAttention(width, heads, batch_first=True, device=device)
        ours = MultiheadAttention(width, heads).to(device)
        ours.load_state_dict(theirs.state_dict())
        other = torch.randn(
            batch, tokens, width, device=device, requires_grad=True
        )  # keys and values of cross-attention
        kinds = {
            "self": (
                partial(ours, x, is_causal=True),
                partial(theirs, x, x, x, need_weights=False, attn_mask=causal, is_causal=True),
                partial(textbook, ours, x, x, causal=True),
            ),
            "cross": (
                partial(ours, x, other),
                partial(theirs, x, other, other, need_weights=False),
                partial(textbook, ours, x, other, causal=False),
            ),
        }
        for kind, (run_ours, run_theirs, run_textbook) in kinds.items():
            torch.testing.assert_close(run_theirs()[0], run_ours(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(run_textbook(), run_ours(), rtol=1e-3, atol=1e-4)
            print(f"  batch {batch:>2} x {tokens:>4} tokens x {width} wide, {heads:>2} heads, {kind:>5}:", end="")
            for name, backward in (("forward", False), ("forward and backward", True)):
                torchs = ratio(run_theirs, run_ours, device, backward=backward)
                formula = ratio(run_textbook, run_ours, device, backward=backward)
                print(f"  {name} {torchs:.2f} / {formula:.2f}", end="", flush=True)
            print()


def textbook(module: MultiheadAttention, query: torch.Tensor, key: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """The textbook formula, with all attention weights in memory: (B,T,E) from query (B,T,E) and key (B,S,E)."""
    assert module.in_proj_weight is not None
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    heads = []
    for x, weight, bias in zip((query, key, key), weights, biases, strict=True):
        heads.append((x @ weight.T + bias).unflatten(-1, (module.num_heads, -1)).transpose(1, 2))
    q, k, v = heads
    scores = q @ k.mT / math.sqrt(q.size(-1))
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return module.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def ratio(theirs: Callable[[], Any], ours: Callable[[], Any], device: str, *, backward: bool) -> float:
    return statistics.median(
        seconds(theirs, device, backward) / seconds(ours, device, backward) for _ in range(ROUNDS + 2)
    )  # the first two pairs warm up; a median of 17 does not mind them


def seconds(run: Callable[[], Any], device: str, backward: bool) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        result = run()
        if backward:
            (result[0] if isinstance(result, tuple) else result).sum().backward()  # torch's gives weights as well
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
