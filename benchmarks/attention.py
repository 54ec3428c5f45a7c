"""Our multi-head attention against torch.nn.MultiheadAttention, with the same weights, in turn in one run.

    python benchmarks/attention.py [--device cuda]

Prints the ratio of torch's time to ours (above 1: ours is faster), median of interleaved pairs.
"""

import argparse
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
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; ratio torch / ours, median of {ROUNDS}"
    )
    for shape in SHAPES:
        batch, tokens, width, heads = shape
        x = torch.randn(batch, tokens, width, device=device, requires_grad=True)
        causal = nn.Transformer.generate_square_subsequent_mask(tokens, device=torch.device(device))
        theirs = nn.MultiheadAttention(width, heads, batch_first=True, device=device)
        ours = MultiheadAttention(width, heads).to(device)

        run_theirs = partial(theirs, x, x, x, need_weights=False, attn_mask=causal, is_causal=True)
        run_ours = partial(ours, x, is_causal=True)
        forward = ratio(run_theirs, run_ours, device, backward=False)
        both = ratio(run_theirs, run_ours, device, backward=True)
        print(f"  batch {batch:>2} x {tokens:>4} tokens x {width} wide, {heads:>2} heads: ", end="")
        print(f"forward {forward:.2f}, forward and backward {both:.2f}")


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
