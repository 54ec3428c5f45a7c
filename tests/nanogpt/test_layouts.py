"""layouts.py: names and shapes there and back, and what has to fit."""

import dataclasses

import pytest
import torch

from model_zoo.nanogpt.layouts import DoesNotFit, export_state, fit, import_state
from model_zoo.nanogpt.model import GPT
from tests.nanogpt.test_loading import TINY, logits, random_model


def test_names_and_shapes_survive_the_way_there_and_back() -> None:
    state = random_model().state_dict()
    for layout in ("huggingface", "nanogpt"):
        back = import_state(export_state(state, TINY, layout), layout)
        back.pop("lm_head.weight", None)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_model_is_fitted_to_fewer_positions_and_more_ids_and_computes_the_same() -> None:
    model = random_model(dataclasses.replace(TINY, bias=False))
    want = dataclasses.replace(model.config, block_size=12, vocab_size=300)
    wider = GPT(want).eval()
    wider.load_state_dict(fit(model.state_dict(), model.config, want))
    torch.testing.assert_close(logits(wider)[..., :256], logits(model), rtol=0, atol=1e-5)
    assert torch.equal(wider.wte.weight[299], model.wte.weight.mean(0))


def test_all_misfits_are_named_at_once() -> None:
    want = dataclasses.replace(TINY, n_layer=3, block_size=32, vocab_size=200, bias=False)
    with pytest.raises(DoesNotFit) as caught:
        fit(random_model().state_dict(), TINY, want)
    for word in ("n_layer is 3", "block_size is 32", "vocab_size is 200", "bias is false"):
        assert word in str(caught.value)


def test_biases_that_are_wanted_and_were_not_there_change_nothing() -> None:
    model = random_model(dataclasses.replace(TINY, bias=False, tied_head=False))
    want = dataclasses.replace(model.config, bias=True, head_bias=True)
    biased = GPT(want).eval()
    biased.load_state_dict(fit(model.state_dict(), model.config, want))
    torch.testing.assert_close(logits(biased), logits(model), rtol=0, atol=1e-5)
