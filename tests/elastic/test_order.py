"""order.py: the same sequences at every step, each once in an epoch, whatever happens to the nodes."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_gpt.order import Order, micro_batch_seed, permute, sequence_count, sequence_hash, share


@given(st.integers(1, 3000), st.text(max_size=8))
def test_every_size_is_permuted(size: int, key: str) -> None:
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_the_order_is_mixed_well() -> None:
    # Over many keys each place is hit about equally often by each id: chi-squared over 64 cells, 63 degrees of freedom.
    counts = np.zeros((8, 8))
    for key in range(4000):
        counts[np.arange(8), permute(np.arange(8), 8, str(key))] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 110
    neighbours = np.abs(np.diff(permute(np.arange(100_000), 100_000, "key")))
    assert abs(neighbours.mean() / 100_000 - 1 / 3) < 0.01  # of independent uniform places


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 5), st.data())
def test_every_sequence_is_used_once_an_epoch_for_any_batch(
    sequences: int, batch: int, seed: int, draw: st.DataObject
) -> None:
    order = Order(sequences, batch, seed)
    steps = -(-3 * sequences // batch)
    # Asked in any order, as after any resume, the answers are the same.
    asked = {step: order.ids(step) for step in draw.draw(st.permutations(range(steps)))}
    used = np.concatenate([asked[step] for step in range(steps)])
    for epoch in range(3):
        assert sorted(used[epoch * sequences : (epoch + 1) * sequences]) == list(range(sequences))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    order = Order(1000, 1000, seed=1)
    assert not np.array_equal(order.ids(0), order.ids(1))
    assert not np.array_equal(order.ids(0), Order(1000, 1000, seed=2).ids(0))
    assert sequence_hash(order.ids(0)) == sequence_hash(Order(1000, 1000, seed=1).ids(0)) != sequence_hash(order.ids(1))


def test_the_order_of_a_run_never_changes_between_versions() -> None:
    # A run that is resumed with a later version of the program must go on with the same data.
    assert Order(1000, 8, seed=1337).ids(5).tolist() == [127, 769, 710, 143, 171, 630, 553, 590]


def test_ten_billion_sequences_cost_no_memory() -> None:
    tracemalloc.start()
    ids = Order(10_000_000_000, 512, seed=1).ids(123_456_789)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(ids)) == 512
    assert peak < 200_000


@given(st.integers(1, 50), st.integers(1, 60))
def test_shares_cover_every_micro_batch_once_and_evenly(micro_batches: int, size: int) -> None:
    shares = [share(micro_batches, rank, size) for rank in range(size)]
    assert [index for one in shares for index in one] == list(range(micro_batches))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_dropout_seeds_differ_between_steps_and_micro_batches() -> None:
    seeds = {micro_batch_seed(1, step, index) for step in range(50) for index in range(50)}
    assert len(seeds) == 2500
    assert micro_batch_seed(1, 2, 3) == micro_batch_seed(1, 2, 3) < 2**63


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (8, 0), (9, 1), (16, 1), (17, 2)])
def test_the_last_target_needs_one_token_more(tokens: int, expected: int) -> None:
    assert sequence_count(tokens, 8) == expected
