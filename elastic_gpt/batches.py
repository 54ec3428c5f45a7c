"""Sequence ids to tensors on the device, one step ahead of the training."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from elastic_gpt.order import Ids, Order, share
from elastic_gpt.world import World

MicroBatch = tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]


class Batches:
    """This rank's share of each global batch.

    Args:
        tokens: all token ids of a split, a (memory-mapped) array of uint16 or uint32.
        block_size: tokens in a sequence.
        micro_batch: sequences in one forward pass.
        order: step to sequence ids.
    """

    def __init__(
        self, tokens: npt.NDArray[np.unsignedinteger], block_size: int, micro_batch: int, order: Order, world: World
    ) -> None:
        self.tokens, self.block_size, self.micro_batch = tokens, block_size, micro_batch
        self.order, self.world = order, world
        self.reader = ThreadPoolExecutor(1, "batches")
        self.ahead: tuple[int, Future[list[MicroBatch]]] | None = None

    def step(self, step: int) -> Iterator[MicroBatch]:
        """The micro-batches of `step` on this rank, int64: index in the global batch, ids (B,), tokens and targets (B, T)."""
        ready = self.ahead[1] if self.ahead and self.ahead[0] == step else self.reader.submit(self._read, step)
        self.ahead = (step + 1, self.reader.submit(self._read, step + 1))
        for index, ids, tokens, targets in ready.result():
            yield (
                index,
                ids.to(self.world.device, non_blocking=True),
                tokens.to(self.world.device, non_blocking=True),
                targets.to(self.world.device, non_blocking=True),
            )

    def _read(self, step: int) -> list[MicroBatch]:
        micro_batches = self.order.ids(step).reshape(-1, self.micro_batch)
        return [
            (
                index,
                _pinned(torch.from_numpy(micro_batches[index]), self.world),
                *gather(self.tokens, micro_batches[index], self.block_size, self.world),
            )
            for index in share(len(micro_batches), self.world.rank, self.world.size)
        ]


def gather(
    tokens: npt.NDArray[np.unsignedinteger], ids: Ids, block_size: int, world: World
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets of the sequences `ids`: two int64 (B, T) in host memory, pinned where the device is a GPU."""
    places = ids[:, None] * block_size + np.arange(block_size + 1)
    block = torch.from_numpy(tokens[places].astype(np.int64))
    inputs, targets = block[:, :-1].contiguous(), block[:, 1:].contiguous()
    return _pinned(inputs, world), _pinned(targets, world)


def _pinned(values: torch.Tensor, world: World) -> torch.Tensor:
    return values.pin_memory() if world.device.type == "cuda" else values
