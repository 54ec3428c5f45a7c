"""The validation loss: all ranks compute it together, on the same sequences each time."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from elastic_gpt.batches import gather
from elastic_gpt.order import Ids, sequence_count, share
from elastic_gpt.world import World


def spread(there: int, sequences: int, micro_batch: int) -> Ids:
    """Ids of `sequences` sequences, evenly spread over the `there` sequences of a split; fewer if it has fewer."""
    count = min(sequences, there)
    count -= count % micro_batch if count >= micro_batch else 0  # one shape, for a compiled model
    return np.linspace(0, there - 1, count).astype(np.int64)


class Evaluator:
    """Mean cross-entropy over the same validation sequences each time.

    Args:
        model: the model; it is in evaluation mode (no dropout) while it computes.
        loss_sum: takes tokens (B, T) and targets (B, T), gives the sum of the cross-entropy over all targets.
        tokens: the token ids of val.bin.
        sequences: how many to use, spread evenly over the split; fewer if it has fewer.
        micro_batch: sequences in one forward pass.

    Raises:
        ValueError: if the split is too short for one sequence.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss_sum: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        tokens: npt.NDArray[np.unsignedinteger],
        *,
        block_size: int,
        sequences: int,
        micro_batch: int,
        world: World,
    ) -> None:
        there = sequence_count(len(tokens), block_size)
        if there == 0:
            raise ValueError(
                f"val.bin holds {len(tokens)} tokens, one sequence needs {block_size + 1}: prepare more text,"
                " a larger --val-fraction, or train with a smaller --model.block-size"
            )
        ids = spread(there, sequences, micro_batch)
        self.micro_batches = [ids[start : start + micro_batch] for start in range(0, len(ids), micro_batch)]
        self.targets = len(ids) * block_size
        self.model, self.loss_sum, self.tokens, self.block_size, self.world = model, loss_sum, tokens, block_size, world

    @torch.no_grad()
    def evaluate(self) -> float:
        """The validation loss in nats per token, the same on every rank and at every world size."""
        # A slot for each micro-batch: one rank fills it, and it is zero on the others, so the sum over the ranks is exact.
        sums = torch.zeros(len(self.micro_batches), dtype=torch.float64)
        self.model.eval()
        found = {}
        for index in share(len(self.micro_batches), self.world.rank, self.world.size):
            tokens, targets = gather(self.tokens, self.micro_batches[index], self.block_size, self.world)
            found[index] = self.loss_sum(*(part.to(self.world.device, non_blocking=True) for part in (tokens, targets)))
        self.model.train()
        for index, loss in found.items():  # only now, so that a GPU need not wait for the host between two
            sums[index] = loss.item()
        self.world.sum(sums)
        return sums.sum().item() / self.targets
