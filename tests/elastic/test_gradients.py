"""gradients.py: the mean gradient of the global batch, on any number of ranks, in real gloo worlds."""

import functools
import operator

import pytest
import torch

from elastic_gpt.gradients import Gradients, LossScale
from elastic_gpt.order import micro_batch_seed, share
from elastic_gpt.world import World
from model_zoo.nanogpt.model import GPT, GPTConfig
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
) -> Gradients:
    parameters = [model] if isinstance(model, torch.nn.Parameter) else model.parameters()
    return Gradients(
        parameters, world, micro_batches=micro_batches, global_batch=micro_batches * size, tokens=tokens, exact=exact
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


def test_exact_sums_do_not_depend_on_the_order_even_where_float64_sums_do() -> None:
    tiny = 2.0**-46
    results = []
    for values in ([256.0, *[tiny] * 4, -256.0], [*[tiny] * 4, 256.0, -256.0]):
        one_by_one = functools.reduce(operator.add, values)  # sum() compensates from Python 3.12 on
        assert (one_by_one == 0.0) == (values[0] == 256.0)  # in float64 the order decides
        parameter = torch.nn.Parameter(torch.ones(1))
        gradients = make(parameter, single(), micro_batches=6, tokens=1, exact=True)
        gradients.zero()
        for index, value in enumerate(values):
            gradients.backward(index, NO_IDS, (parameter * torch.tensor(value)).sum())
        gradients.reduce(stop=False, leave=False)
        results.append(gradients.gradient.item())
    assert results[0] == results[1]


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
    assert not scale.unscale(torch.tensor([float("inf"), 1.0]))
    assert scale.factor.item() == start / 2
    gradient = torch.tensor([start / 2, start])
    assert scale.unscale(gradient)
    assert gradient.tolist() == [1.0, 2.0]
    for _ in range(1999):
        scale.unscale(torch.ones(1))
    assert scale.factor.item() == start
