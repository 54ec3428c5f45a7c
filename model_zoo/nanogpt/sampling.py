"""Draws the next token, and decides which part of a long text the model sees. Knows tokens, not text.

Letters in comments: B batch, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError, with the cure, for settings that `next_token` cannot follow."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; give 0 (always the likeliest token) or more, usually 0.5 to 1")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; give at least 1, or leave it out")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; give a probability above 0 and up to 1, or leave it out")


def next_token(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Draw one token for each row: logits (B,V) to ids (B,1), int64.

    `temperature` divides the logits; 0 takes the likeliest. `top_k` keeps the k likeliest; `top_p` then keeps the
    fewest of the likeliest whose probabilities sum to at least top_p (nucleus sampling, arXiv 1904.09751), never none.
    With a sequence of generators each row has its own, and gets what it would get alone.
    Raises ValueError for logits that are not finite.
    """
    if not logits.amax(-1).isfinite().all():  # amax finds NaN and infinity, but allows ids that are excluded with -inf
        raise ValueError("the model's output is not finite: its training went wrong; generate from an older checkpoint")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float()
    # The likeliest is 0, so nothing can overflow; and a temperature that float32 does not know would make it 0 / 0.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(torch.float32).tiny)
    if top_k is None and top_p is None:
        return _draw(logits.softmax(-1), generator)
    vocab_size = logits.size(-1)
    kept, ids = logits.topk(vocab_size if top_k is None else min(top_k, vocab_size))  # sorted, likeliest first
    probabilities = kept.softmax(-1)
    if top_p is not None:
        likelier = probabilities.cumsum(-1) - probabilities  # probability of all likelier ids; 0 for the first
        probabilities = probabilities.masked_fill(likelier >= top_p, 0.0)
    return ids.gather(-1, _draw(probabilities, generator))


def _draw(probabilities: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """One index for each row of `probabilities` (B,V), (B,1): what torch.multinomial draws, without its checks.

    The first of exponential clocks that run as fast as the probabilities; each clock is one number of the generator.
    """
    clocks = torch.empty_like(probabilities)
    if isinstance(generator, Sequence):
        for row, own in zip(clocks, generator, strict=True):
            row.exponential_(generator=own)
    else:
        clocks.exponential_(generator=generator)
    return (probabilities / clocks).argmax(-1, keepdim=True)


def window_start(length: int, block_size: int) -> int:
    """The index at which the context of the next token starts, after `length` tokens; 0 while they fit into the block.

    With learned positions a cached key belongs to its position, so a window that slides by one
    token would have to compute the whole block again for each token. It jumps instead: when the
    block is full, its last half becomes the context. That costs half a block of prefill once in
    half a block of tokens, and the context always has at least half a block. It depends only on the
    length, so an interrupted reply can go on as if it had not been.
    """
    if length <= block_size:
        return 0
    jump = block_size + 1 - max(1, block_size // 2)
    return -(-(length - block_size) // jump) * jump
