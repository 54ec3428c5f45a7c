"""batches.py: a rank's share of each global batch, in any number of passes through the model."""

import numpy as np
import pytest
import torch

from elastic_gpt.batches import Batches
from elastic_gpt.gradients import HALF, Gradients
from elastic_gpt.order import Order
from elastic_gpt.world import World

BLOCK, MICRO_BATCH, MICRO_BATCHES = 8, 3, 7
TOKENS = np.arange(1000, dtype=np.uint16)
ORDER = Order((len(TOKENS) - 1) // BLOCK, MICRO_BATCH * MICRO_BATCHES, seed=5)


def batches(rank: int, size: int, merged: int) -> Batches:
    return Batches(TOKENS, BLOCK, MICRO_BATCH, ORDER, world(rank, size), merged=merged)


def world(rank: int, size: int) -> World:
    return World(rank, size, rank, "single", torch.device("cpu"), elastic=False)


@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("merged", [1, 2, 3, 100])
def test_each_sequence_is_in_one_pass_and_none_is_larger_than_allowed(size: int, merged: int) -> None:
    for step in (0, 1, 12):
        seen: list[int] = []
        for rank in range(size):
            for index, ids, tokens, targets in batches(rank, size, merged).step(step):
                assert index * MICRO_BATCH == len(seen)  # its place in the global batch
                assert len(ids) <= merged * MICRO_BATCH
                assert torch.equal(tokens[:, 0], ids * BLOCK)
                assert torch.equal(targets, tokens + 1)
                seen += ids.tolist()
        assert seen == ORDER.ids(step).tolist()


@pytest.mark.parametrize("merged", [2, 3, 100])
def test_merged_micro_batches_have_the_same_gradient_loss_and_ids(merged: int) -> None:
    def step(merged: int) -> tuple[float, torch.Tensor, list[int]]:
        weight = torch.nn.Parameter(torch.tensor([0.5, 2.0]))
        tokens = MICRO_BATCH * MICRO_BATCHES * BLOCK
        gradients = Gradients(
            [weight],
            world(0, 1),
            micro_batches=MICRO_BATCHES,
            global_batch=ORDER.global_batch,
            tokens=tokens,
            exact=False,
        )
        gradients.zero()
        for index, ids, inputs, _ in batches(0, 1, merged).step(4):
            x = inputs / 1000
            gradients.backward(index, ids, (weight[0] * x + weight[1] * x**2).sum())
        sums = gradients.reduce(stop=False, leave=False)
        upper, lower = sums.ids.long()
        return sums.loss.item(), gradients.gradient.clone(), ((upper << HALF) | lower).tolist()

    loss, gradient, ids = step(merged)
    expected_loss, expected, expected_ids = step(1)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    torch.testing.assert_close(gradient, expected)
    assert ids == expected_ids == ORDER.ids(4).tolist()
