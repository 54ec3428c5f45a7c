"""Loads the sequences of a step to the device as tensors, one step ahead of the training."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from elastic_gpt.devices import pinned
from elastic_gpt.order import Ids, Order, share
from elastic_gpt.world import World

MicroBatch = tuple[Any, ...]  # index in the global batch, sequence ids, and the inputs of the model


class Batches:
    """This rank's share of each global batch.

    Args:
        tokens: all token ids of a split, a (memory-mapped) array of uint16 or uint32.
        block_size: tokens in a sequence.
        micro_batch: sequences in a micro-batch.
        order: gives the sequence ids of each step.
        merged: most micro-batches that go through the model together.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.unsignedinteger],
        block_size: int,
        micro_batch: int,
        order: Order,
        world: World,
        *,
        merged: int = 1,
    ) -> None:
        self.tokens, self.block_size, self.micro_batch, self.merged = tokens, block_size, micro_batch, merged
        self.order, self.world = order, world
        self.reader = ThreadPoolExecutor(1, "batches")
        self.ahead: tuple[int, Future[list[MicroBatch]]] | None = None

    def step(self, step: int) -> Iterator[MicroBatch]:
        """The micro-batches of `step` on this rank, int64: index in the global batch, ids (B,), tokens and targets (B, T).

        If some are merged, B counts the sequences of all of them, and the index is that of the
        first.
        """
        ready = self.ahead[1] if self.ahead and self.ahead[0] == step else self.reader.submit(self._read, step)
        self.ahead = (step + 1, self.reader.submit(self._read, step + 1))
        for index, *tensors in ready.result():
            yield (index, *(tensor.to(self.world.device, non_blocking=True) for tensor in tensors))

    def close(self) -> None:
        """Ends the loading, when the world is over."""
        self.reader.shutdown(wait=False, cancel_futures=True)

    def _read(self, step: int) -> list[MicroBatch]:
        micro_batches = self.order.ids(step).reshape(-1, self.micro_batch)
        mine = share(len(micro_batches), self.world.rank, self.world.size)
        passes = -(-len(mine) // self.merged)
        found = []
        for number in range(passes):
            part = share(len(mine), number, passes)
            together = mine[part.start : part.stop]
            ids = micro_batches[together.start : together.stop].reshape(-1)
            found.append((together.start, pinned(torch.from_numpy(ids), self.world.device), *self.load(ids)))
        return found

    def load(self, ids: Ids) -> tuple[torch.Tensor, ...]:
        """The inputs of the model for the sequences `ids`, in host memory."""
        return gather(self.tokens, ids, self.block_size, self.world)


class Examples(Batches):
    """The same for any data that can be indexed: stacks the tensors of `data[i]`.

    Args:
        data: `data[i]` is a tuple of tensors or numbers of the same shapes for every i.
    """

    def __init__(self, data: Any, micro_batch: int, order: Order, world: World) -> None:
        super().__init__(np.empty(0, np.uint16), 1, micro_batch, order, world)
        self.data = data

    def load(self, ids: Ids) -> tuple[torch.Tensor, ...]:
        columns = zip(*(self.data[int(number)] for number in ids), strict=True)
        return tuple(
            pinned(torch.stack([torch.as_tensor(one) for one in column]), self.world.device) for column in columns
        )


def gather(
    tokens: npt.NDArray[np.unsignedinteger], ids: Ids, block_size: int, world: World
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets of the sequences `ids`: two int64 (B, T) in host memory, pinned where the device is a GPU."""
    places = ids[:, None] * block_size + np.arange(block_size + 1)
    block = torch.from_numpy(tokens[places].astype(np.int64))
    inputs, targets = block[:, :-1].contiguous(), block[:, 1:].contiguous()
    return pinned(inputs, world.device), pinned(targets, world.device)
