"""Next-token sampling and the token stream; what `generate` and `serve` share. Knows tokens, not text.

Letters in comments: B batch, T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .model import GPT


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError, with the cure, for settings that `next_token` could not follow."""
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
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token for each row: logits (B,V) to ids (B,1), int64.

    `temperature` divides the logits; 0 takes the likeliest. `top_k` keeps the k likeliest; `top_p` then keeps the
    fewest of the likeliest whose probabilities sum to at least top_p (nucleus sampling, arXiv 1904.09751), never none.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the likeliest is 0, so nothing can overflow
    if top_k is None and top_p is None:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)
    vocab_size = logits.size(-1)
    kept, ids = logits.topk(vocab_size if top_k is None else min(top_k, vocab_size))  # sorted, likeliest first
    probabilities = kept.softmax(-1)
    if top_p is not None:
        likelier = probabilities.cumsum(-1) - probabilities  # what is likelier than each; 0 for the first
        probabilities = probabilities.masked_fill(likelier >= top_p, 0.0)
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator))


def window_start(length: int, block_size: int) -> int:
    """Where the context of the next token starts, `length` tokens being there: 0 while they fit the block.

    Learned positions bind a cached key to its place, so a window that slides by one token would have to compute the
    whole block anew for each. It jumps instead: a token that does not fit leaves the last half block as context, which
    costs half a block of prefill once in half a block of tokens. The context is so always half a block at least. It
    depends on the length alone, so that a reply that is taken up again goes on as if it had not been interrupted.
    """
    if length <= block_size:
        return 0
    jump = block_size + 1 - max(1, block_size // 2)
    return -(-(length - block_size) // jump) * jump


def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
    stop_ids: Sequence[int] = (),
) -> Iterator[Tensor]:
    """Continue `tokens`, int64 (B,T) with T >= 1, by up to `max_new_tokens`, yielding one token a row at a time, (B,1).

    Ends early when each row has drawn one of `stop_ids`, which is yielded too; a row that has ended goes on until the
    last one has, and its reader cuts it. `vocab_size` bars the ids from there on: those that a padded vocabulary has
    and the tokenizer has not. The model must be in eval mode. Contexts longer than the block: see `window_start`.
    Raises ValueError for settings that make no sense, here and not at the first token.
    """
    check_sampling(temperature, top_k, top_p)
    if tokens.size(1) < 1:
        raise ValueError("there is no token to start from; give at least one")
    return _stream(model, tokens, max_new_tokens, temperature, top_k, top_p, generator, vocab_size, stop_ids)


@torch.inference_mode()
def _stream(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
    vocab_size: int | None,
    stop_ids: Sequence[int],
) -> Iterator[Tensor]:
    block_size = model.config.block_size
    length = tokens.size(1)  # all tokens so far, those that have left the window too
    start = window_start(length, block_size)
    window = tokens[:, start:]  # BxT, what the model sees
    fresh, cache = window, model.new_cache()
    stops = torch.tensor(stop_ids, device=tokens.device)
    ended = torch.zeros(tokens.size(0), dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        logits = model.next_logits(fresh, cache)[:, :vocab_size]
        token = next_token(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        yield token
        if stop_ids:
            ended |= torch.isin(token[:, 0], stops)
            if ended.all():
                return
        window, length = torch.cat((window, token), dim=1), length + 1
        moved = window_start(length, block_size)
        if moved == start:
            fresh = token
        else:
            window = window[:, moved - start :]
            fresh, cache, start = window, model.new_cache(), moved
