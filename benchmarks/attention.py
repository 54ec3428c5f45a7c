"""Compares our multi-head attention with torch.nn.MultiheadAttention and with the textbook formula, in turn in one run.

    python benchmarks/attention.py [--device cuda] [--threads 1] [--rounds 15]

Prints the ratio of the other's time to ours (above 1: ours is faster), median of rounds in which each has its turn; causal
self-attention and cross-attention, forward alone and with backward. One thread's time is the processor's, which other work on
the machine disturbs less. All three have the same weights, and their outputs are compared first.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from model_zoo.nanogpt.attention import MultiheadAttention

SHAPES = [(8, 256, 384, 6), (4, 1024, 768, 12), (12, 64, 128, 4)]  # batch, tokens, embedding, heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    device = options.device
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, {device}, {options.threads} threads;"
        f" time divided by ours, torch / textbook, median of {options.rounds}\n\n"
        "| batch x tokens x width, heads | | forward | forward and backward |\n| --- | --- | --- | --- |"
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
        for kind, runs in kinds.items():
            run_ours, run_theirs, run_textbook = runs
            torch.testing.assert_close(run_theirs()[0], run_ours(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(run_textbook(), run_ours(), rtol=1e-3, atol=1e-4)
            cells = []
            for backward in (False, True):
                torchs, formula = ratios(runs, options.rounds, device, backward=backward)
                cells.append(f"{torchs:.2f} / {formula:.2f}")
            print(f"| {batch} x {tokens} x {width}, {heads} | {kind} | {' | '.join(cells)} |", flush=True)


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


def ratios(runs: Sequence[Callable[[], Any]], rounds: int, device: str, *, backward: bool) -> list[float]:
    """How many times as long as the first one each of the others takes."""
    took = [[seconds(run, device, backward) for run in runs] for _ in range(rounds + 2)]
    return [statistics.median(one[number] / one[0] for one in took[2:]) for number in range(1, len(runs))]


def seconds(run: Callable[[], Any], device: str, backward: bool) -> float:
    # Threads that wait for others take the processor's time, too.
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    with torch.set_grad_enabled(backward):
        result = run()
        if backward:
            (result[0] if isinstance(result, tuple) else result).sum().backward()  # torch's gives weights as well
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    main()
