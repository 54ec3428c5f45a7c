"""Exact mode: sums of gradients that are the same bit for bit in any order, and so at every world size (law 4).

The gradient of each micro-batch is rounded to whole multiples of QUANTUM and counted in int32, where sums are exact and take
the bytes of a float32. They cannot overflow: what a number has beyond its micro-batch's share of an int32 is cut off and set
aside in float64. Such numbers are few. They travel behind the others, in blocks, and those blocks alone.
"""

import torch

from elastic_gpt.devices import is_host
from elastic_gpt.world import World

# Two units of the last digit of a float32 of 1e-4. Gradients below 2**-5, divided among the micro-batches, fit into an int32;
# and sums of what is set aside are exact below 2**53 of these, which is 2**17: far above what a run survives.
QUANTUM = 2.0**-36
BLOCK = 256  # neighbours of a large gradient that travel with it; and a slot of `agreed` is 1/256 of what travels
FEW = 1 << 12  # of which, on a CPU, those are searched one by one that hold a large one
CHUNK = 1 << 16


class ExactSum:
    """The sum of the gradients of many micro-batches, in whole numbers.

    Args:
        gradient: float32 (N,): what a backward pass adds to, and where the sum is wanted.
        blocks: zeros, float32 (N / BLOCK, rounded up): gets 1 where something was set aside; to be summed over the ranks.
        micro_batches: their number in a global batch.
    """

    def __init__(self, gradient: torch.Tensor, blocks: torch.Tensor, micro_batches: int) -> None:
        self.gradient, self.blocks = gradient, blocks
        self.numbers = gradient.view(torch.int32)
        """The same memory: once a part is closed, it holds whole numbers."""
        # Rounded down to what a float32 can hold.
        self.most = float((2**31 - 1) // micro_batches & ~0xFF)
        # A GPU is better asked once about all than often about few: each answer is waited for.
        on_host = is_host(gradient.device)
        self._chunk, self._few = (CHUNK, FEW) if on_host else (max(1, len(gradient)),) * 2
        self._scratch = torch.empty(self._chunk, dtype=torch.int32, device=gradient.device)
        # int32 (N,): this rank's micro-batches but the last, if it has more than one.
        self._before: torch.Tensor | None = None
        self._counted = False  # whether there is anything in it
        self._rest: torch.Tensor | None = None  # float64 (N,): sums of what was cut off, in a step with very much of it
        # Where, int64 (n,), and what was cut off, float64 (n,).
        self._aside = list[tuple[torch.Tensor, torch.Tensor]]()

    def zero(self) -> None:
        """Begin a step."""
        self._counted = False
        self._rest = None
        self._aside.clear()

    def count(self) -> None:
        """Take the gradient of a micro-batch that is not this rank's last one, and leave zeros."""
        if self._before is None:
            self._before = torch.empty_like(self.numbers)
        for part in self._chunks(slice(0, len(self.gradient))):
            if self._counted:
                self._before[part].add_(self._rounded(part))
            else:
                self._before[part].copy_(self._rounded(part))
            self.gradient[part].zero_()
        self._counted = True
        # Else each micro-batch might add as much again.
        if 2 * sum(len(index) for index, _ in self._aside) > len(self.gradient):
            if self._rest is None:
                self._rest = torch.zeros_like(self.gradient, dtype=torch.float64)
            for index, rest in self._aside:
                self._rest.index_add_(0, index, rest)
            self._aside.clear()

    def alone(self) -> None:
        """After the last micro-batch, in a world of one: what `close` and `settle` would make of the gradient."""
        if self._counted:
            self.close(slice(0, len(self.gradient)))
            self.settle(None)
            return
        for part in self._chunks(slice(0, len(self.gradient))):  # a sum of one: nothing is cut off
            # Whole numbers know no negative zero, hence 0.0.
            self.gradient[part].mul_(1 / QUANTUM).round_().add_(0.0).mul_(QUANTUM)

    def close(self, piece: slice) -> None:
        """After the last micro-batch, once a step: replace a piece of the gradient by this rank's whole numbers."""
        for part in self._chunks(piece):
            mine = self._rounded(part)
            if self._counted:
                assert self._before is not None
                mine.add_(self._before[part])
            self.numbers[part].copy_(mine)

    def settle(self, world: World | None) -> None:
        """When the whole numbers and `blocks` are summed over the ranks, if there are others: make the gradient of them."""
        blocks = self.blocks.nonzero().squeeze(1)
        large = torch.zeros((len(blocks), BLOCK), dtype=torch.float64, device=blocks.device)
        where = (blocks[:, None] * BLOCK + torch.arange(BLOCK, device=blocks.device)).flatten()
        for index, rest in self._aside:
            row = torch.searchsorted(blocks, index // BLOCK)
            large.view(-1).index_add_(0, row * BLOCK + index % BLOCK, rest)
        where = where[where < len(self.gradient)]  # the last block may be shorter
        if self._rest is not None:
            large.view(-1)[: len(where)] += self._rest[where]
        if world and len(blocks):
            world.sum(large)
            world.settle()
        large = (large.view(-1)[: len(where)] + self.numbers[where]) * QUANTUM
        for part in self._chunks(slice(0, len(self.gradient))):
            torch.mul(self.numbers[part].to(torch.float32), QUANTUM, out=self.gradient[part])
        self.gradient[where] = large.to(torch.float32)

    def _chunks(self, part: slice) -> list[slice]:
        starts = range(part.start, part.stop, self._chunk)
        return [slice(start, min(start + self._chunk, part.stop)) for start in starts]

    def _rounded(self, part: slice) -> torch.Tensor:
        """The gradient's part in whole numbers, int32. What is too large for them is set aside."""
        gradient = self.gradient[part].mul_(1 / QUANTUM)  # a power of two: nothing is rounded
        if self._any_large(gradient):
            for number, few in enumerate(gradient.split(self._few)):
                if len(few) == len(gradient) or self._any_large(few):
                    self._set_aside(part.start + number * self._few, few)
        return self._scratch[: len(gradient)].copy_(gradient.round_())

    def _any_large(self, gradient: torch.Tensor) -> bool:
        least, greatest = gradient.aminmax()
        return not (-self.most <= float(least) and float(greatest) <= self.most)  # NaN is neither

    def _set_aside(self, start: int, gradient: torch.Tensor) -> None:
        """Cut off what is too large. What is NaN or infinite becomes so in the sum, since the rest of it is."""
        large = (gradient != gradient.clamp(-self.most, self.most)).nonzero().squeeze(1)
        numbers = gradient[large].round()
        fits = numbers.clamp(-self.most, self.most).nan_to_num_(0.0)
        self._aside.append((start + large, numbers.double() - fits))
        self.blocks[(start + large) // BLOCK] = 1.0
        gradient[large] = fits
