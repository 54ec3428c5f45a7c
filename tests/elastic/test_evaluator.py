"""evaluator.py: the validation loss is the same number at every world size, over the same sequences each time."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from elastic_gpt.evaluator import Evaluator, spread
from elastic_gpt.world import World
from tests.elastic.worlds import run_world

BLOCK, VOCABULARY = 8, 64
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, 21 * BLOCK + 1).astype(np.uint16)
ALONE = World(0, 1, 0, "single", torch.device("cpu"), elastic=False)


class Model(torch.nn.Module):
    """Notes for each forward pass whether it is in training mode and whether gradients are wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Embedding(VOCABULARY, VOCABULARY)
        torch.nn.init.normal_(self.logits.weight, generator=torch.Generator().manual_seed(0))
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.modes.append((self.training, torch.is_grad_enabled()))
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten(), reduction="sum")


def evaluator(world: World, model: Model, tokens: np.ndarray = TOKENS) -> Evaluator:
    return Evaluator(model, model, tokens, block_size=BLOCK, sequences=99, micro_batch=3, world=world)


def loss(world: World) -> float:
    return evaluator(world, Model()).evaluate()


def test_every_rank_of_every_world_has_the_mean_over_the_whole_split() -> None:
    alone = loss(ALONE)
    tokens = torch.from_numpy(TOKENS.astype(np.int64))[None]
    with torch.no_grad():
        expected = Model()(tokens[:, :-1], tokens[:, 1:]).item() / (len(TOKENS) - 1)
    assert alone == pytest.approx(expected, rel=1e-6)
    assert run_world(3, loss) == [alone] * 3


def test_the_model_evaluates_without_dropout_and_gradients_and_trains_on_afterwards() -> None:
    model = Model()
    evaluator(ALONE, model).evaluate()
    assert set(model.modes) == {(False, False)}
    assert model.training


@pytest.mark.parametrize(("there", "sequences", "count"), [(100, 10, 8), (10, 99, 8), (3, 99, 3)])
def test_sequences_are_spread_from_the_first_to_the_last_in_whole_micro_batches(
    there: int, sequences: int, count: int
) -> None:
    ids = spread(there, sequences, micro_batch=4)
    gaps = np.diff(ids)
    assert (len(ids), ids[0], ids[-1]) == (count, 0, there - 1)
    assert max(gaps) - min(gaps) <= 1


def test_a_split_without_a_whole_sequence_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"val\.bin holds 8 tokens, one sequence needs 9: prepare more text"):
        evaluator(ALONE, Model(), TOKENS[:BLOCK])
