"""shape.py: an impossible shape is refused with its value, and what a possible one takes is known without a model."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from model_zoo.nanogpt.shape import GPTConfig

TINY = GPTConfig(vocab_size=61, block_size=16, n_layer=3, n_head=4, n_embd=32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 5}, "n_embd 32 is not a multiple of model.n_head 5"),
        ({"n_layer": 0}, "model.n_layer is 0; give at least 1"),
        ({"vocab_size": -1}, "model.vocab_size is -1"),
        ({"block_size": 2**31}, "at most 2,147,483,647"),
        ({"dropout": 1.0}, "model.dropout is 1.0"),
        ({"n_kv_head": 3}, "model.n_kv_head 3 does not divide model.n_head 4"),
        ({"n_kv_head": -1}, "model.n_kv_head -1"),
        ({"positions": "rotary", "n_embd": 36}, "a head is 9 wide"),
    ],
)
def test_an_impossible_shape_is_refused_with_its_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"positions": "rotary", "block_size": 512}, {"n_kv_head": 1}, {"activation": "swiglu"}, {"bias": False}],
    ids=str,
)
def test_a_model_has_no_fewer_parameters_than_its_shape_says_and_few_more(changes: dict[str, Any]) -> None:
    from model_zoo.nanogpt.model import GPT

    config = replace(TINY, **changes)
    with torch.device("meta"):
        count = GPT(config).parameter_count()
    assert config.least_parameters <= count <= 1.1 * config.least_parameters
