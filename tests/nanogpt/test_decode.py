"""One more token of each row is what the model says of the whole row, for every variant of the model."""

from typing import Any

import pytest
import torch
from torch import nn

from elastic_gpt import devices
from model_zoo.nanogpt.attention import KeyValueCache
from model_zoo.nanogpt.decode import next_logits
from model_zoo.nanogpt.model import GPT, GPTConfig

VARIANTS = [
    {},
    {"bias": False, "qkv_bias": False},
    {"qkv_bias": False, "tied_head": False, "head_bias": True},
    {"positions": "rotary", "norm": "rms", "qk_norm": True, "activation": "relu2", "n_kv_head": 2},
    {"positions": "rotary", "n_kv_head": 1},
    {"qk_norm": True, "activation": "swiglu"},
]


@pytest.mark.parametrize("slow", [False, True], ids=["F.linear", "a batch of products"])
@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 1, 12], [1]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_logits_are_the_last_of_one_pass_over_each_row(
    variant: dict[str, Any], lengths: list[int], slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "slow_at_few_rows", lambda _x: slow)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=37, block_size=12, n_layer=2, n_head=4, n_embd=32, **variant)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    rows = [torch.randint(37, (length,)) for length in lengths]
    memory = torch.zeros(2, 4, 2, model.config.n_kv_head or 4, 12, 8)  # one slot more than there are rows
    with torch.no_grad():
        for slot, row in enumerate(rows):
            if len(row) > 1:
                layers = memory[:, slot : slot + 1].transpose(1, 2)
                model.hidden(row[None, :-1], [KeyValueCache(12, layer) for layer in layers])
        found = next_logits(model, memory, [int(row[-1]) for row in rows], [len(row) - 1 for row in rows])
        expected = torch.cat([model(row[None])[:, -1] for row in rows])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not memory[:, len(rows) :].any()
