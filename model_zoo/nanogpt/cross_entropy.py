"""The head and the loss of a large vocabulary: some tokens at a time, so that all logits never exist at once.

Where matrix products are bfloat16 (autocast), torch 2.13's own `linear_cross_entropy` stays in float32; the products here
do not. The softmax and the loss are float32 anyway. The forward pass computes the gradients, too, while it has the logits.

On a GPU the head is computed on a multiple of 64 tokens, which its matrix products want (50,304 for GPT-2's 50,257). The
copy in bfloat16 that the products need has the rows that are missing, all zero; their logits are minus infinity, so they
take no probability and have no gradient. Parameters, checkpoints and logits know nothing of them.

Letters in comments: N tokens, D embedding, V vocabulary, W vocabulary with the rows that fill it up.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 256  # tokens whose logits are held on a CPU, by measurement: they stay in its cache
LOGITS = 1 << 28  # logits that are held on a GPU: 0.5 GB, in which 5,336 tokens of GPT-2 keep it busy
MULTIPLE = 64  # of which a GPU's vocabulary is one: rows of logits then begin at multiples of 128 bytes


def on_host(x: Tensor) -> bool:
    return x.device.type == "cpu"


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Summed cross-entropy, in nats, of the logits `x @ weight.T + bias` against `targets`; products in bfloat16.

    Args:
        x: hidden vectors, float32 (N,D).
        weight: of the head, float32 (V,D).
        bias: of the head, float32 (V,), or None.
        targets: int64 (N,).

    Returns a float32 scalar, which can be differentiated once. torch.compile takes it up into the graph around it.
    """
    if on_host(x):
        chunk, rows = CHUNK, len(weight)
    else:
        rows = -(-len(weight) // MULTIPLE) * MULTIPLE
        parts = max(1, -(-len(x) * rows // LOGITS))
        chunk = -(-len(x) // parts)
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, bias, targets, chunk, rows, torch.is_grad_enabled())
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed for a loss that is not scaled, and multiplied in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int, rows: int, trains: bool
    ) -> Tensor:
        # The vocabulary is filled up in the copy that bfloat16 needs anyway.
        w = F.pad(weight.bfloat16(), (0, 0, 0, rows - len(weight))) if rows > len(weight) else weight.bfloat16()
        of_all = _traced if torch.compiler.is_compiling() else _in_place
        loss, grads = of_all(x.bfloat16(), w, bias, targets, chunk, len(weight), trains)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (scale,) = outputs
        x, *of_head = ctx.saved_tensors
        if torch.compiler.is_compiling():
            of_head = [grad * scale for grad in of_head]
        else:
            of_head = [grad.mul_(scale) for grad in of_head]
        weight, bias = of_head if len(of_head) == 2 else (*of_head, None)
        return x.float() * scale, weight, bias, None, None, None, None


def _in_place(
    x: Tensor, w: Tensor, bias: Tensor | None, targets: Tensor, chunk: int, vocabulary: int, trains: bool
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradients of x, bfloat16 (N,D), weight and bias, float32; none if it does not train.

    Memory for the logits of a chunk is taken once: on a CPU fresh memory costs more than what is computed in it.
    """
    most = min(chunk, len(x))
    logits, p = x.new_empty(most, len(w)), x.new_empty(most, len(w), dtype=torch.float32)  # CxW
    loss = p.new_zeros(())
    grads = []
    if trains:
        grads = [torch.empty_like(x), p.new_zeros(vocabulary, w.size(1))]
        grads += [] if bias is None else [torch.zeros_like(bias)]
        of_chunk = torch.empty_like(w)
    for start in range(0, len(x), chunk):
        part, target = x[start : start + chunk], targets[start : start + chunk]
        logits, p, row = logits[: len(part)], p[: len(part)], torch.arange(len(part), device=x.device)
        torch.mm(part, w.T, out=logits)
        if bias is not None:
            logits[:, :vocabulary] += bias
        logits[:, vocabulary:].fill_(-math.inf)
        torch.softmax(logits, 1, dtype=torch.float32, out=p)
        # The largest probability is one over the sum of exp(logit - largest logit), and never 0.
        loss += (logits.amax(1).float() - p.amax(1).log() - logits[row, target]).sum()
        if trains:
            p[row, target] -= 1
            logits.copy_(p)  # now the gradient of the logits
            torch.mm(logits, w, out=grads[0][start : start + chunk])
            grads[1].add_(torch.mm(logits.T, part, out=of_chunk)[:vocabulary])
            if bias is not None:
                grads[2].add_(p[:, :vocabulary].sum(0))
    return loss, grads


def _traced(
    x: Tensor, w: Tensor, bias: Tensor | None, targets: Tensor, chunk: int, vocabulary: int, trains: bool
) -> tuple[Tensor, list[Tensor]]:
    """The same for torch.compile, which makes two passes over the logits of all that lies between the products."""
    column = torch.arange(len(w), device=x.device)
    loss = x.new_zeros((), dtype=torch.float32)
    of_x, of_weight = [], x.new_zeros(vocabulary, w.size(1), dtype=torch.float32)
    of_bias = None if bias is None else torch.zeros_like(bias)
    for part, target in zip(x.split(chunk), targets.split(chunk), strict=True):
        wide, target = (part @ w.T).float(), target.unsqueeze(1)  # CxW, Cx1
        if bias is not None:
            wide = wide + F.pad(bias, (0, len(w) - vocabulary))
        if len(w) > vocabulary:
            wide = torch.where(column < vocabulary, wide, -math.inf)
        total = wide.logsumexp(1, keepdim=True)
        loss = loss + (total - wide.gather(1, target)).sum()
        if trains:
            grad = (wide - total).exp() - (column == target).float()
            narrow = grad.bfloat16()
            of_x.append(narrow @ w)
            of_weight = of_weight + (narrow.T @ part)[:vocabulary]
            of_bias = None if of_bias is None else of_bias + grad.sum(0)[:vocabulary]
    if not trains:
        return loss, []
    return loss, [torch.cat(of_x), of_weight] + ([] if of_bias is None else [of_bias])
