"""Any number of micro-batches on any number of ranks, and the one true mean gradient of the global batch (law 3).

All gradients live in one flat buffer, and each parameter's `.grad` is a view of it. A step is: `zero`, one `backward` for
each micro-batch of this rank's share, then `reduce`: one all_reduce of the buffer. A rank may have no micro-batch at all,
and nothing is rebuilt when the world changes. Each loss is divided by the tokens of the *global* batch before its backward
pass, so the sum over all ranks is the mean over all tokens, however unevenly the micro-batches are shared out.

The buffer's tail carries what the ranks must agree on in the same step anyway: the loss of each micro-batch and the ids of
its sequences, in slots of their own, what each took, and how many workers were asked to stop, and of these how many leave.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from elastic_gpt.world import World

# In exact mode a gradient is counted in whole multiples of this. Sums of whole numbers held in float64 are exact while they
# stay below 2**53 multiples, that is |gradient| < 512; so the order of summation, hence the world, cannot change them.
QUANTUM = 2.0**-44
HALF = 24  # bits of a sequence id in one slot: whole numbers up to 2**24 are exact in float32


@dataclass(frozen=True)
class StepSums:
    """What all ranks know after `reduce`."""

    loss: torch.Tensor
    """Mean cross-entropy of the global batch, a scalar on the device (reading it waits for the device)."""
    ids: torch.Tensor
    """Of the sequences that went into the gradient, in order: upper and lower `HALF` bits, (2, global batch) on the device."""
    stops: torch.Tensor
    """Workers that were asked to stop, and how many of them leave for good; (2,) on the device."""
    seconds: torch.Tensor
    """That each micro-batch took (pace.py), (micro-batches,) on the device."""


class Gradients:
    """The gradient buffer of a model.

    Args:
        parameters: those that are trained; their `.grad` become views of the buffer.
        micro_batches: in a global batch.
        global_batch: sequences in a step.
        tokens: targets in a global batch, over all ranks.
        exact: sum in whole numbers, so that the result is the same bit for bit at every world size (law 4).
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        world: World,
        *,
        micro_batches: int,
        global_batch: int,
        tokens: int,
        exact: bool,
    ) -> None:
        self.parameters = list(parameters)
        self.world = world
        self.tokens = tokens
        size = sum(parameter.numel() for parameter in self.parameters)
        # The tail is part of the buffer so that one message carries both.
        sizes = [size, micro_batches, 2 * global_batch, 2, micro_batches]
        self.buffer = torch.zeros(sum(sizes), dtype=torch.float32, device=world.device)
        self.gradient, self.losses, ids, self.stops, self.seconds = self.buffer.split(sizes)
        self.ids = ids.view(2, micro_batches, -1)
        self.total = torch.zeros_like(self.buffer, dtype=torch.float64) if exact else None
        self.scratch = torch.zeros_like(self.gradient, dtype=torch.float64) if exact else None
        start = 0
        for parameter in self.parameters:
            parameter.grad = self.gradient[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def zero(self) -> None:
        """Begin a step."""
        self.buffer.zero_()
        if self.total is not None:
            self.total.zero_()

    def backward(
        self, micro_batch: int, ids: torch.Tensor, loss_sum: torch.Tensor, scale: torch.Tensor | float = 1.0
    ) -> None:
        """Add the gradient of one micro-batch, or of some that went through the model together (not in exact mode).

        Args:
            micro_batch: its index in the global batch; the first one's, which then has the loss of all in its slot.
            ids: of its sequences, int64 (B,).
            loss_sum: sum of the cross-entropy over its targets, a scalar.
            scale: what a float16 run multiplies its losses by.
        """
        mean = loss_sum / self.tokens
        (mean * scale).backward()
        self.losses[micro_batch] = mean.detach()
        halves = torch.stack((ids >> HALF, ids & ((1 << HALF) - 1)))
        merged = max(1, len(ids) // self.ids.size(2))
        self.ids[:, micro_batch : micro_batch + merged] = halves.view(2, merged, -1)
        if self.total is not None and self.scratch is not None:
            self.scratch.copy_(self.gradient).div_(QUANTUM).round_()  # NaN and infinity pass through, to be seen
            self.total[: len(self.scratch)].add_(self.scratch)
            self.gradient.zero_()

    def reduce(self, stop: bool, leave: bool) -> StepSums:
        """Sum over all ranks. Afterwards every `.grad` is the mean gradient over the global batch's tokens.

        Args:
            stop: whether this worker was asked to stop after this step.
            leave: whether it then leaves for good.

        Raises:
            PeerLost: if a peer died; the step is then dropped whole.
        """
        self.stops[0], self.stops[1] = float(stop), float(leave)
        if self.total is None:
            self.world.sum(self.buffer)
        else:
            # Slots that one rank fills and the others leave zero are exact in any order as they are.
            self.total[len(self.gradient) :].copy_(self.buffer[len(self.gradient) :])
            self.world.sum(self.total)
            self.total[: len(self.gradient)].mul_(QUANTUM)
            self.buffer.copy_(self.total)
        # One slot per micro-batch, added up in the same order everywhere: the loss does not depend on the world either.
        return StepSums(self.losses.sum(), self.ids.flatten(1).clone(), self.stops.clone(), self.seconds.clone())

    def clip(self, limit: float) -> torch.Tensor:
        """Scale the gradient down to the norm `limit` (0: leave it); return its norm before, a scalar on the device."""
        norm = torch.linalg.vector_norm(self.gradient)
        if limit > 0:
            self.gradient.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        return norm


def not_finite(sums: StepSums, norm: torch.Tensor) -> torch.Tensor:
    """1.0 if the loss or the gradient's norm is NaN or infinite, else 0.0: a scalar on the device, the same on every rank."""
    return 1.0 - (sums.loss.isfinite() & norm.isfinite()).float()


def update(optimizer: torch.optim.Optimizer, skip: torch.Tensor) -> None:
    """One update, or none if `skip` (`not_finite`) is 1.0: then parameters, moments and the optimizer's step stay."""
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = skip  # type: ignore[attr-defined]  # as torch.amp.GradScaler does: nobody waits for the device
        optimizer.step()
    elif not bool(skip):
        optimizer.step()


class LossScale:
    """The factor that keeps float16 gradients from vanishing: halved after an overflow, doubled after 2,000 good steps.

    Its two numbers are part of the training state, so a restored run goes on with the same ones.
    """

    def __init__(self, device: torch.device) -> None:
        self.state = torch.tensor([2.0**16, 0.0], device=device)  # the factor, and good steps since it last changed

    @property
    def factor(self) -> torch.Tensor:
        return self.state[0].clone()

    def unscale(self, gradient: torch.Tensor) -> bool:
        """Divide the reduced gradient by the factor; False if it overflowed, and the update must be left out."""
        gradient.div_(self.state[0])
        if not bool(torch.isfinite(gradient).all()):
            self.state[0].mul_(0.5)
            self.state[1] = 0.0
            return False
        self.state[1] += 1
        if self.state[1] >= 2000:
            self.state[0].mul_(2.0)
            self.state[1] = 0.0
        return True
