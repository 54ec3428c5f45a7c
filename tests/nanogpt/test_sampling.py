"""sampling.py: which tokens are drawn with which probability."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_zoo.nanogpt.sampling import check_sampling, next_token, window_start


def draws(logits: Tensor, n: int = 4000, **options: Any) -> Tensor:
    """`n` draws from logits (V)."""
    generator = torch.Generator().manual_seed(0)
    return next_token(logits.expand(n, -1), generator=generator, **options)[:, 0]


rows = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12)


@settings(max_examples=60)
@given(rows, st.floats(0.05, 5), st.none() | st.integers(1, 15), st.none() | st.floats(0.01, 1), st.integers(0, 99))
def test_a_draw_is_among_the_k_likeliest_and_in_the_nucleus(
    row: list[float], temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> None:
    logits = torch.tensor([row, row[::-1]])
    generator = torch.Generator().manual_seed(seed)
    drawn = next_token(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    assert drawn.shape == (2, 1)
    assert drawn.dtype == torch.int64
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature  # in float32, where near ones become equal
    for ids, numbers in zip(drawn.tolist(), scaled.double(), strict=True):
        probabilities = numbers.softmax(-1)
        likelier = probabilities[numbers > numbers[ids[0]]]
        if top_k is not None:
            assert len(likelier) < top_k
            probabilities = probabilities / probabilities.topk(min(top_k, len(row))).values.sum()
            likelier = probabilities[numbers > numbers[ids[0]]]
        if top_p is not None:
            assert likelier.sum() < top_p + 1e-5


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({}, logits.softmax(-1)),
        ({"temperature": 2.0}, (logits / 2).softmax(-1)),
        ({"top_k": 2}, torch.tensor([2.0, 1.0, -torch.inf, -torch.inf]).softmax(-1)),
        ({"top_p": 0.9}, torch.tensor([2.0, 1.0, 0.0, -torch.inf]).softmax(-1)),  # 0.64 + 0.24 do not make 0.9
        ({"top_k": 3, "top_p": 0.7}, torch.tensor([2.0, 1.0, -torch.inf, -torch.inf]).softmax(-1)),  # 0.67 do not
    ]
    for options, expected in cases:
        found = draws(logits, **options).bincount(minlength=4) / 4000
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


def test_top_k_keeps_k_even_where_all_are_equal() -> None:
    assert len(draws(torch.zeros(50), top_k=7).unique()) == 7


def test_temperature_0_and_near_0_take_the_likeliest() -> None:
    logits = torch.tensor([1.0, 900.0, 899.0, -5.0])
    for options in ({"temperature": 0}, {"temperature": 1e-37}, {"top_k": 1}, {"top_p": 1e-9}):
        assert (draws(logits, 50, **options) == 1).all()


@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 9])
def test_the_window_jumps_only_when_full_and_keeps_half_a_block(block_size: int) -> None:
    kept = max(1, block_size // 2)
    start = 0
    for length in range(1, 60):
        if length - start > block_size:
            start = length - kept
        assert window_start(length, block_size) == start
        assert length <= block_size or kept <= length - start <= block_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((-1, None, None), "temperature is -1"),
        ((float("nan"), None, None), "temperature is nan"),
        ((1, 0, None), "top_k is 0"),
        ((1, None, 0.0), "top_p is 0.0"),
        ((1, None, 1.5), "top_p is 1.5"),
    ],
)
def test_impossible_sampling_settings_are_refused(
    options: tuple[float, int | None, float | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_sampling(*options)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}])
def test_rows_with_generators_of_their_own_get_what_each_gets_alone(options: dict[str, Any]) -> None:
    logits = torch.randn(6, 20)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(6)]

    together = next_token(logits, generator=generators(), **options)
    alone = [next_token(row[None], generator=own, **options) for row, own in zip(logits, generators(), strict=True)]
    assert together.tolist() == torch.cat(alone).tolist()
    if not options:
        pairs = zip(logits.softmax(-1), generators(), strict=True)
        assert together[:, 0].tolist() == [int(torch.multinomial(row, 1, generator=own)) for row, own in pairs]


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 1e-300}])
def test_a_temperature_that_float32_does_not_know_takes_the_likeliest(options: dict[str, Any]) -> None:
    assert set(draws(torch.tensor([0.0, 2.0, 1.0]), 50, temperature=5e-324, **options).tolist()) == {1}
