"""The head and the loss of a large vocabulary on CPUs: some tokens at a time, so that all logits never exist at once.

Where matrix products are bfloat16 (autocast), torch 2.13's own `linear_cross_entropy` stays in float32; the products here
do not. The softmax and the loss are float32 anyway.

Letters in comments: N tokens, D embedding, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK = 256  # tokens whose logits are held


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Summed cross-entropy, in nats, of the logits `x @ weight.T + bias` against `targets`; products in bfloat16.

    Args:
        x: hidden vectors, float32 (N,D).
        weight: of the head, float32 (V,D).
        bias: of the head, float32 (V,), or None.
        targets: int64 (N,).

    Returns a float32 scalar, which can be differentiated once.
    """
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, bias, targets, torch.is_grad_enabled())
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward pass computes the gradients, too, while it has the logits of a chunk."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, trains: bool) -> Tensor:
        x, w = x.bfloat16(), weight.bfloat16()
        rows = min(CHUNK, len(x))
        logits = torch.empty(rows, len(w), dtype=torch.bfloat16)
        p = torch.empty(rows, len(w))
        loss = torch.zeros(())
        if trains:
            grads = torch.empty_like(x), torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
            of_chunk = torch.empty_like(w)
        for start in range(0, len(x), CHUNK):
            chunk, target = x[start : start + CHUNK], targets[start : start + CHUNK]
            logits, p, row = logits[: len(chunk)], p[: len(chunk)], torch.arange(len(chunk))
            torch.mm(chunk, w.T, out=logits)
            if bias is not None:
                logits += bias
            torch.softmax(logits, 1, dtype=torch.float32, out=p)
            # The largest probability is one over the sum of exp(logit - largest logit), and never 0.
            loss += (logits.amax(1).float() - p.amax(1).log() - logits[row, target]).sum()
            if trains:
                p[row, target] -= 1
                logits.copy_(p)  # now the gradient of the logits
                torch.mm(logits, w, out=grads[0][start : start + CHUNK])
                grads[1].add_(torch.mm(logits.T, chunk, out=of_chunk))
                if grads[2] is not None:
                    grads[2].add_(p.sum(0))
        if trains:
            ctx.grads = grads
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (scale,) = outputs
        x, weight, bias = ctx.grads
        ctx.grads = None
        return x.float() * scale, weight.mul_(scale), None if bias is None else bias.mul_(scale), None, None
