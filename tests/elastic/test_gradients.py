"""gradients.py: the mean gradient of the global batch, on any number of ranks, in real gloo worlds."""

import itertools
import os
import threading
from typing import Any

import pytest
import torch

from elastic_gpt import exact as exact_module
from elastic_gpt import gradients as module
from elastic_gpt.gradients import Gradients, LossScale, not_finite
from elastic_gpt.order import micro_batch_seed, share
from elastic_gpt.settings import Traffic
from elastic_gpt.world import PeerLost, World, leave
from model_zoo.nanogpt.model import GPT, GPTConfig
from tests.conftest import PATIENCE
from tests.elastic.worlds import run_world

CONFIG = GPTConfig(vocab_size=31, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.2)
SIZE = 3  # sequences in a micro-batch
NO_IDS = torch.tensor([0])


def make(
    model: torch.nn.Module | torch.nn.Parameter,
    world: World,
    *,
    micro_batches: int = 1,
    size: int = 1,
    tokens: int = 1,
    exact: bool = False,
    traffic: Traffic = "float32",
    piece: int = 500,
) -> Gradients:
    """Gradients that travel in pieces of `piece` numbers."""
    parameters = [model] if isinstance(model, torch.nn.Parameter) else model.parameters()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", piece)
        return Gradients(
            parameters,
            world,
            micro_batches=micro_batches,
            global_batch=micro_batches * size,
            tokens=tokens,
            exact=exact,
            traffic=traffic,
        )


def step(world: World, micro_batches: int, exact: bool, steps: int = 1) -> tuple[list[float], torch.Tensor, float]:
    """Losses, the last gradient and its norm after some updates."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    tokens = torch.randint(31, (micro_batches, SIZE, 9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    count = micro_batches * SIZE * 8
    gradients = make(model, world, micro_batches=micro_batches, size=SIZE, tokens=count, exact=exact)
    losses = []
    for done in range(steps):
        gradients.zero()
        for index in share(micro_batches, world.rank, world.size):
            torch.manual_seed(micro_batch_seed(1, done, index))
            gradients.backward(index, NO_IDS, model(tokens[index, :, :-1], tokens[index, :, 1:]))
        losses.append(gradients.reduce(stop=False, leave=False).loss.item())
        norm = gradients.clip(0.5).item()
        optimizer.step()
    return losses, gradients.gradient.clone(), norm


def single() -> World:
    return World(0, 1, 0, "single", torch.device("cpu"), elastic=False)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # as each rank has: what is equal bit for bit is equal on equal devices


@pytest.mark.parametrize(("size", "micro_batches"), [(2, 8), (3, 8), (5, 2), (4, 4)])
def test_any_world_has_the_gradient_of_a_single_process(size: int, micro_batches: int) -> None:
    losses, gradient, norm = step(single(), micro_batches, exact=False)
    for their_losses, theirs, their_norm in run_world(size, step, micro_batches, False):
        assert their_losses == pytest.approx(losses, rel=1e-6)
        torch.testing.assert_close(theirs, gradient, rtol=1e-4, atol=1e-7)
        assert their_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_exact_mode_is_equal_bit_for_bit_after_many_steps(size: int) -> None:
    losses, gradient, norm = step(single(), 4, True, 10)
    for their_losses, theirs, their_norm in run_world(size, step, 4, True, 10):
        assert their_losses == losses
        assert torch.equal(theirs, gradient)
        assert their_norm == norm


def test_the_gradient_is_that_of_the_mean_over_all_tokens() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=31, block_size=8, n_layer=1, n_head=2, n_embd=16))
    tokens = torch.randint(31, (4, SIZE, 9))
    logits = model(tokens[:, :, :-1].reshape(-1, 8))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, :, 1:].flatten())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    for exact in (False, True):
        gradients = make(model, single(), micro_batches=4, size=SIZE, tokens=4 * SIZE * 8, exact=exact)
        gradients.zero()
        for index in range(4):
            gradients.backward(index, NO_IDS, model(tokens[index, :, :-1], tokens[index, :, 1:]))
        assert gradients.reduce(stop=False, leave=False).loss.item() == pytest.approx(loss.item(), rel=1e-6)
        torch.testing.assert_close(gradients.gradient, expected, rtol=1e-4, atol=1e-7)


VALUES = (1.0, 2.0**-30, 900.0, -(2.0**-36), 1.75 * 2.0**-36, -900.0, 2.0**-7 + 2.0**-20, -1.0)


def large_and_small(world: World) -> list[float]:
    """Sums over eight micro-batches, of numbers that fit into their share of an int32 and of some that do not."""
    parameter = torch.nn.Parameter(torch.zeros(1201))
    gradients = make(parameter, world, micro_batches=8, exact=True)
    assert gradients.exact
    most = gradients.exact.most * exact_module.QUANTUM
    for _ in range(2):  # nothing of the first step is left in the second
        gradients.zero()
        for index in share(8, world.rank, world.size):
            values = torch.full((1201,), 2.0**-9)
            values[3] = 1.75 * exact_module.QUANTUM
            values[0], values[700], values[1200] = VALUES[index], VALUES[-1 - index] * 100, most * (1 if index else 2)
            gradients.backward(index, NO_IDS, (parameter * values).sum())
        gradients.reduce(stop=False, leave=False)
    return gradients.gradient.tolist()


def test_exact_sums_are_those_of_whole_numbers_in_every_world_however_large_they_are() -> None:
    found = large_and_small(single())
    quantum = exact_module.QUANTUM
    whole = [round(torch.tensor(value).double().item() / quantum) for value in VALUES]
    assert found[0] == torch.tensor(sum(whole) * quantum, dtype=torch.float64).float().item()
    assert found[1] == found[1199] == 2.0**-6
    assert found[3] == 8 * 2 * quantum
    assert found[1200] == pytest.approx(9 * 2.0**-8, rel=1e-5)
    for size in (2, 3, 4):  # of four ranks each has two
        assert run_world(size, large_and_small) == [found] * size


def test_a_micro_batch_takes_no_more_than_its_share_of_an_int32() -> None:
    for count in (1, 2, 3, 7, 8, 480, 65537):
        summed = exact_module.ExactSum(torch.zeros(4), torch.zeros(1), count)
        assert 0 < summed.most * count < 2**31
        assert torch.tensor(summed.most).item() == summed.most  # as a float32


def test_what_many_large_micro_batches_set_aside_takes_no_more_memory_than_their_sum() -> None:
    """In a small model, or at the beginning of a run, much of a gradient may be large."""
    values = torch.linspace(-50.0, 50.0, 1000)
    gradient, blocks = torch.zeros(1000), torch.zeros(-(-1000 // exact_module.BLOCK))
    summed = exact_module.ExactSum(gradient, blocks, 64)
    for _ in range(2):
        summed.zero()
        blocks.zero_()
        gradient.zero_()
        for micro_batch in range(64):
            gradient.add_(values * (micro_batch + 1))
            summed.count() if micro_batch < 63 else summed.close(slice(0, 1000))
            assert sum(len(index) for index, _ in summed._aside) <= 1000
        summed.settle(single())
        whole = sum((values * (number + 1)).double().mul(2.0**36).round() for number in range(64)) * 2.0**-36
        assert torch.equal(gradient, whole.float())


def test_the_only_gradient_of_a_world_of_one_is_what_whole_numbers_would_make_of_it() -> None:
    torch.manual_seed(0)
    values = torch.randn(70_000) * torch.logspace(-14, 3, 70_000)
    values[:6] = torch.tensor([-(2.0**-38), 0.0, -0.0, 1e30, torch.inf, torch.nan])
    found = []
    for alone in (True, False):
        gradient = values.clone()
        summed = exact_module.ExactSum(gradient, torch.zeros(-(-70_000 // exact_module.BLOCK)), 8)
        if alone:
            summed.alone()
        else:
            summed.close(slice(0, 70_000))
            summed.settle(None)
        found.append(gradient.view(torch.int32))  # in which 0.0 and -0.0 differ
    assert torch.equal(found[0][:5], found[1][:5])
    assert found[0][6:].tolist() == found[1][6:].tolist()
    assert all(one.view(torch.float32)[5].isnan() for one in found)


def test_an_exact_sum_takes_the_bytes_and_collectives_of_an_inexact_one_and_few_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[int] = []
    monkeypatch.setattr(World, "sum", lambda _, values: sent.append(values.nbytes))
    for exact in (False, True):
        weight = torch.nn.Parameter(torch.zeros(100_000))
        gradients = make(
            weight, World(0, 2, 0, "", torch.device("cpu"), False), micro_batches=8, exact=exact, piece=1 << 14
        )
        for index in range(4):
            gradients.backward(index, NO_IDS, weight.sum() * 1e-4)
        gradients.reduce(stop=False, leave=False)
    half = len(sent) // 2
    assert len(sent) == 2 * half
    assert sum(sent[half:]) < 1.005 * sum(sent[:half])


class Waits(torch.autograd.Function):
    """Nothing, whose backward pass goes on when `event` is set."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, event: threading.Event) -> torch.Tensor:
        ctx.event = event
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        assert ctx.event.wait(PATIENCE), "no piece was summed while the backward pass went on"
        return gradient, None


def pieces(world: World, exact: bool, traffic: Traffic) -> tuple[list[tuple[int, int]], list[float]]:
    """The pieces in the order in which they were summed, on four parameters whose gradients come in another one."""
    parts = torch.nn.ParameterList([torch.nn.Parameter(torch.full((100,), float(number))) for number in range(4)])
    gradients = make(parts, world, micro_batches=2, exact=exact, traffic=traffic, piece=60)
    summed, first, sum_piece = [], threading.Event(), gradients._sum

    def seen(piece: slice) -> None:
        sum_piece(piece)
        summed.append((piece.start, piece.stop))
        first.set()

    gradients._sum = seen  # type: ignore[method-assign]
    for _ in range(2):
        summed.clear()
        first.clear()
        gradients.zero()
        for index in share(2, world.rank, world.size):
            # What is made last comes first in the backward pass: here the third parameter is last, and waits for a sum.
            third = Waits.apply(parts[2], first)  # type: ignore[no-untyped-call]
            loss = (third + (parts[3] + (parts[1] + parts[0]))).sum()
            gradients.backward(index, NO_IDS, (index + 1.0) * loss)
        gradients.reduce(stop=False, leave=False)
    return summed, gradients.gradient.tolist()


@pytest.mark.parametrize(("exact", "traffic"), [(False, "float32"), (True, "float32"), (False, "bfloat16")])
@pytest.mark.parametrize("size", [2, 3])
def test_pieces_travel_in_one_order_while_a_backward_pass_goes_on(size: int, exact: bool, traffic: Traffic) -> None:
    borders = [400, 340, 280, 220, 160, 100, 40, 0]
    expected = [(start, end) for end, start in itertools.pairwise(borders)]
    for summed, gradient in run_world(size, pieces, exact, traffic):  # of three ranks one has no micro-batch
        assert summed == expected
        assert gradient == [3.0] * 400


def rounded(world: World, traffic: Traffic) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """The gradient, its bound on the error by rounding, and what the ranks agree on."""
    values = [torch.randn(1001, generator=torch.Generator().manual_seed(rank)) for rank in range(world.size)]
    parameter = torch.nn.Parameter(torch.zeros(1001))
    gradients = make(parameter, world, micro_batches=world.size, traffic=traffic)
    gradients.zero()
    ids = torch.tensor([(1 << 30) + world.rank])
    gradients.backward(world.rank, ids, (parameter * values[world.rank]).sum() + 1 / 3)
    sums = gradients.reduce(stop=False, leave=False)
    true = torch.stack(values).double().sum(0)
    # Each rank's part is rounded once to 8 bits, half a unit of the last one off at most, and so is the sum.
    bound = 2.0**-8 * (torch.stack(values).abs().sum(0) * (1 + 2.0**-8) + true.abs()) + 1e-6
    return (gradients.gradient - true).abs(), bound, [sums.loss.item(), *sums.ids.flatten().tolist()]


@pytest.mark.parametrize("size", [2, 3])
def test_bfloat16_traffic_rounds_each_part_and_the_sum_once_and_nothing_else(size: int) -> None:
    plain = run_world(size, rounded, "float32")
    for (error, bound, agreed), (small, _, expected) in zip(run_world(size, rounded, "bfloat16"), plain, strict=True):
        assert (error <= bound).all()
        assert error.max() > 100 * small.max()  # it was rounded
        assert agreed == expected == [pytest.approx(size / 3), *[64.0] * size, *map(float, range(size))]


def one_is_infinite(world: World, exact: bool, traffic: Traffic, infinite: int) -> float:
    parameter = torch.nn.Parameter(torch.ones(1200))
    gradients = make(parameter, world, micro_batches=4, exact=exact, traffic=traffic)
    gradients.zero()
    for index in share(4, world.rank, world.size):
        loss = Bad.apply(parameter) if index == infinite else parameter.sum()  # type: ignore[no-untyped-call]
        gradients.backward(index, NO_IDS, loss)
    return not_finite(gradients.reduce(stop=False, leave=False), gradients.clip(1.0)).item()


class Bad(torch.autograd.Function):
    """A finite loss with a gradient that is not finite in one place."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        ctx.like = values
        return values.sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        bad = torch.ones_like(ctx.like)
        bad[700] = float("inf")
        return bad * gradient


@pytest.mark.parametrize(("exact", "traffic"), [(False, "float32"), (True, "float32"), (False, "bfloat16")])
def test_an_infinite_gradient_of_one_micro_batch_skips_the_update_everywhere(exact: bool, traffic: Traffic) -> None:
    assert run_world(3, one_is_infinite, exact, traffic, 1) == [1.0] * 3
    assert run_world(3, one_is_infinite, exact, traffic, -1) == [0.0] * 3


def in_the_middle(world: World, exact: bool, traffic: Traffic) -> tuple[str, list[bool], list[float], list[float]]:
    """Rank 2 dies after two of its pieces; the others leave and do the step again alone."""
    parameter = torch.nn.Parameter(torch.ones(3000))
    gradients = make(parameter, world, micro_batches=4, exact=exact, traffic=traffic)
    sum_piece, summed = gradients._sum, []

    def dying(piece: slice) -> None:
        if world.rank == 2 and len(summed) == 2:
            os._exit(0)
        sum_piece(piece)
        summed.append(piece)

    gradients._sum = dying  # type: ignore[method-assign]

    def whole_step() -> None:
        gradients.zero()
        for index in share(4, gradients.world.rank, gradients.world.size):
            gradients.backward(index, NO_IDS, (parameter * (index + 1.0)).sum())
        gradients.reduce(stop=False, leave=False)

    with pytest.raises(PeerLost) as lost:
        whole_step()
    assert leave()
    gradients.zero()
    quiet = gradients.gradient.clone()
    gradients.world = single()
    whole_step()
    return str(lost.value), [len(summed) < 6, not quiet.any()], gradients.gradient.unique().tolist(), parameter.tolist()


@pytest.mark.parametrize(("exact", "traffic"), [(False, "float32"), (True, "float32"), (False, "bfloat16")])
def test_a_rank_that_dies_between_two_pieces_costs_the_step_and_nothing_of_it_is_left(
    exact: bool, traffic: Traffic
) -> None:
    survivors = run_world(3, in_the_middle, exact, traffic, dies=[2])
    assert len(survivors) == 2
    for rank, (why, clean, gradient, parameter) in enumerate(survivors):
        assert f"rank {rank} of 3 lost a peer" in why
        assert clean == [True, True]
        assert gradient == [10.0]
        assert parameter == [1.0] * 3000


def test_after_a_failure_nothing_more_is_sent_and_the_next_step_begins_anew() -> None:
    sender, done = module.Sender(), []

    def fails() -> None:
        raise PeerLost("gone")

    for work in (lambda: done.append(1), fails, lambda: done.append(2)):
        sender.send(work)
    with pytest.raises(PeerLost, match="gone"):
        sender.wait()
    sender.send(lambda: done.append(3))
    sender.wait()
    assert done == [1, 3]


def with_a_frozen_part(world: World) -> list[float]:
    parts = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(600)) for _ in range(3)])
    parts[2].requires_grad_(False)
    gradients = make(parts, world, micro_batches=2)
    gradients.zero()
    gradients.backward(world.rank, NO_IDS, (parts[0] * parts[2]).sum())  # the second has no part in the loss
    gradients.reduce(stop=False, leave=False)
    return [part.grad.unique().item() for part in parts]


def test_parameters_without_a_gradient_hold_up_nobody() -> None:
    assert run_world(2, with_a_frozen_part) == [[2.0, 0.0, 0.0]] * 2


def twice(world: World) -> str:
    parameter = torch.nn.Parameter(torch.ones(1000))
    gradients = make(parameter, world, micro_batches=2)
    gradients.zero()
    inputs = torch.ones(1000, requires_grad=True)
    inside = torch.utils.checkpoint.checkpoint(lambda one: one * parameter, inputs, use_reentrant=True)
    with pytest.raises(RuntimeError) as error:
        gradients.backward(world.rank, NO_IDS, (inside + parameter).sum())
    return str(error.value)


def test_a_gradient_that_comes_after_it_was_sent_is_an_error() -> None:
    assert all("use_reentrant=False" in error for error in run_world(2, twice))


def stops(world: World) -> list[float]:
    parameter = torch.nn.Parameter(torch.zeros(3))
    gradients = make(parameter, world)
    gradients.zero()
    return gradients.reduce(stop=world.rank > 0, leave=world.rank == 2).stops.tolist()


def test_every_rank_hears_of_a_stop_in_the_same_step() -> None:
    assert run_world(3, stops) == [[2.0, 1.0]] * 3


def test_an_infinite_gradient_is_seen_and_not_hidden_in_exact_mode() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    gradients = make(parameter, single(), exact=True)
    gradients.zero()
    gradients.backward(0, NO_IDS, (parameter * torch.tensor([float("inf"), 1.0])).sum())
    gradients.reduce(stop=False, leave=False)
    assert gradients.gradient.isinf().tolist() == [True, False]


def test_clipping_scales_the_whole_gradient_and_zero_means_none() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    gradients = make(parameter, single())
    gradients.gradient.copy_(torch.tensor([3.0, 4.0]))
    assert gradients.clip(0.0).item() == pytest.approx(5.0)
    assert gradients.gradient.tolist() == [3.0, 4.0]
    assert gradients.clip(1.0).item() == pytest.approx(5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)


def test_a_float16_overflow_halves_the_scale_and_leaves_out_the_update() -> None:
    scale = LossScale(torch.device("cpu"))
    start = scale.factor.item()
    overflow = torch.tensor([float("inf"), 1.0])
    scale.unscale(overflow)
    assert overflow.isinf().any()  # so that the norm is not finite, and the update left out
    assert scale.factor.item() == start / 2
    gradient = torch.tensor([start / 2, start])
    scale.unscale(gradient)
    assert gradient.tolist() == [1.0, 2.0]
    for _ in range(1999):
        scale.unscale(torch.ones(1))
    assert scale.factor.item() == start


@pytest.mark.parametrize("given_up", [True, False])
def test_what_comes_after_a_sum_was_given_up_is_written_where_nobody_looks(
    given_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    gradients = make(weight, World(0, 2, 0, "node", torch.device("cpu"), elastic=True))
    late: list[torch.Tensor] = []

    def stuck(_world: World, values: torch.Tensor) -> None:
        late.append(values)
        lost = PeerLost("gone")
        lost.given_up = given_up
        raise lost

    monkeypatch.setattr(World, "sum", stuck)
    gradients.zero()
    gradients.backward(0, NO_IDS, weight.sum())
    with pytest.raises(PeerLost):
        gradients.reduce(stop=False, leave=False)
    late[0].fill_(7.0)  # as gloo does when the rest of a message comes after all
    gradients.world = single()
    assert weight.grad is not None
    assert bool((weight.grad == 7.0).any()) is not given_up
    gradients.zero()
    gradients.backward(0, NO_IDS, weight.sum())
    gradients.reduce(stop=False, leave=False)
    assert torch.equal(weight.grad, torch.ones(4))
