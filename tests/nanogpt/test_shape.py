"""shape.py: an impossible shape is refused with its value."""

from typing import Any

import pytest

from tests.nanogpt.test_model import tiny


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_head", 5, "n_embd 32 is not a multiple of model.n_head 5"),
        ("n_layer", 0, "model.n_layer is 0; give at least 1"),
        ("vocab_size", -1, "model.vocab_size is -1"),
        ("dropout", 1.0, "model.dropout is 1.0"),
    ],
)
def test_an_impossible_shape_is_refused_with_its_value(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_head": 3}, "model.n_kv_head 3 does not divide model.n_head 4"),
        ({"n_kv_head": -1}, "model.n_kv_head -1"),
        ({"positions": "rotary", "n_embd": 36}, "a head is 9 wide"),
    ],
)
def test_an_impossible_variant_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
