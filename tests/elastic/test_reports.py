"""reports.py: the report of a step says what was done in it."""

import numpy as np
import pytest
import torch

from elastic_gpt.batches import Batches
from elastic_gpt.gradients import Gradients, not_finite, update
from elastic_gpt.order import Ids, Order, sequence_hash, share
from elastic_gpt.reports import Observer, Reporter, StepReport
from elastic_gpt.world import World
from tests.elastic.worlds import run_world

BLOCK, MICRO_BATCH, MICRO_BATCHES, STEPS = 4, 3, 5, 3
ORDER = Order(sequences=40, global_batch=MICRO_BATCH * MICRO_BATCHES, seed=7)  # epochs end inside a step


class Far(Order):
    """Ids that need more bits than a float32 has."""

    def ids(self, step: int) -> Ids:
        return super().ids(step) + (np.int64(1) << 40) + 1


class Swapped(Order):
    """Two sequences of a step in the wrong order."""

    def ids(self, step: int) -> Ids:
        ids = super().ids(step)
        ids[[0, 1]] = ids[[1, 0]]
        return ids


class Kept(Observer):
    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def on_step(self, report: StepReport) -> None:
        self.reports.append(report)


def hashes(world: World, order: Order, exact: bool, lost: int | None = None) -> list[str]:
    """The sequence hashes of a few steps, in which one micro-batch may be left out."""
    parameter = torch.nn.Parameter(torch.ones(1))
    batches = Batches(np.arange(40 * BLOCK + 1, dtype=np.uint16), BLOCK, MICRO_BATCH, order, world)
    gradients = Gradients(
        [parameter], world, micro_batches=MICRO_BATCHES, global_batch=order.global_batch, tokens=1, exact=exact
    )
    kept = Kept()
    reporter = Reporter([kept], world, recent=[], keep=9, tokens_per_step=1, flops_per_token=1, peak=None)
    for step in range(STEPS):
        gradients.zero()
        for index, ids, tokens, targets in batches.step(step):
            assert torch.equal(tokens[:, 0], ids * BLOCK)  # sequence i of these tokens begins with token i * BLOCK
            assert torch.equal(targets[:, -1], (ids + 1) * BLOCK)
            if index != lost:
                gradients.backward(index, ids, (parameter * tokens.sum()).sum())
        reporter.step(step + 1, 0.0, gradients.reduce(stop=False, leave=False), torch.zeros(()))
    reporter.drain()
    assert world.size == 1 or not kept.reports  # a rank may have come to the end of it alone
    reporter.all_did()
    return [report.sequence_hash for report in kept.reports]


def with_a_bad_micro_batch(world: World, exact: bool, where: str, odd: float) -> tuple[list[float], dict]:
    """Two steps, the second with a loss or a gradient that is not finite on one rank; parameters, and the last report."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    batches = Batches(np.arange(40 * BLOCK + 1, dtype=np.uint16), BLOCK, MICRO_BATCH, ORDER, world)
    gradients = Gradients(
        [parameter], world, micro_batches=MICRO_BATCHES, global_batch=ORDER.global_batch, tokens=1, exact=exact
    )
    kept = Kept()
    reporter = Reporter([kept], world, recent=[], keep=9, tokens_per_step=1, flops_per_token=1, peak=None)
    after = []
    for step in range(2):
        gradients.zero()
        for index, ids, *_ in batches.step(step):
            loss = parameter.sum()
            if step == 1 and index == 2:
                loss = loss + odd if where == "loss" else loss * (parameter.sum() * 0 + 1) * odd
            gradients.backward(index, ids, loss)
        sums = gradients.reduce(stop=False, leave=False)
        norm = gradients.clip(1.0)
        update(optimizer, not_finite(sums, norm))
        reporter.step(step + 1, 0.1, sums, norm)
        after.append(parameter.detach().tolist() + [float(value) for value in optimizer.state[parameter]["exp_avg"]])
    reporter.drain()
    assert world.size == 1 or not kept.reports  # a rank may have come to the end of it alone
    reporter.all_did()
    assert after[0] == after[1]
    assert after[0] != [1.0, 1.0, 0.0, 0.0]
    assert optimizer.state[parameter]["step"] == 1
    assert reporter.skipped == 1
    return after[1], kept.reports[-1].line() | {"tokens_per_second": 0, "world_size": 0}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("where", "odd"), [("loss", float("nan")), ("loss", float("inf")), ("gradient", 1e39)])
def test_an_update_that_is_not_finite_is_left_out_alike_in_every_world(exact: bool, where: str, odd: float) -> None:
    results = [one for size in (1, 3, 7) for one in run_world(size, with_a_bad_micro_batch, exact, where, odd)]
    assert all(one == results[0] for one in results)
    line = results[0][1]
    assert (line["step"], line["skipped"], line["loss"], line["grad_norm"]) == (2, True, None, None)
    assert line["sequence_hash"] == sequence_hash(ORDER.ids(1))


def planned(order: Order) -> list[str]:
    return [sequence_hash(order.ids(step)) for step in range(STEPS)]


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("exact", [False, True])
def test_the_sequence_hash_is_of_what_was_trained_and_the_same_in_any_world(size: int, exact: bool) -> None:
    assert run_world(size, hashes, ORDER, exact) == [planned(ORDER)] * size
    for wrong in (run_world(size, hashes, ORDER, exact, 2), run_world(size, hashes, Swapped(40, 15, 7), exact)):
        assert not set(wrong[0]) & set(planned(ORDER))


def trained(world: World, exact: bool) -> str:
    """The hash of one step of ids that are far apart."""
    parameter = torch.nn.Parameter(torch.ones(1))
    order = Far(40, MICRO_BATCH * MICRO_BATCHES, 7)
    gradients = Gradients([parameter], world, micro_batches=MICRO_BATCHES, global_batch=15, tokens=1, exact=exact)
    gradients.zero()
    for index in share(MICRO_BATCHES, world.rank, world.size):
        ids = torch.from_numpy(order.ids(0).reshape(MICRO_BATCHES, MICRO_BATCH)[index])
        gradients.backward(index, ids, parameter.sum())
    kept = Kept()
    reporter = Reporter([kept], world, recent=[], keep=9, tokens_per_step=1, flops_per_token=1, peak=None)
    reporter.step(1, 0.0, gradients.reduce(stop=False, leave=False), torch.zeros(()))
    reporter.drain()
    assert world.size == 1 or not kept.reports  # a rank may have come to the end of it alone
    reporter.all_did()
    return kept.reports[0].sequence_hash


@pytest.mark.parametrize("exact", [False, True])
def test_ids_beyond_what_float32_holds_exactly_are_not_rounded(exact: bool) -> None:
    expected = sequence_hash(Far(40, MICRO_BATCH * MICRO_BATCHES, 7).ids(0))
    assert run_world(2, trained, exact) == [expected] * 2
