"""startup.py: the start of a training."""

from typing import Any

import pytest
import torch

from elastic_gpt.world import World
from model_zoo.nanogpt.config import ElasticConfig, TrainConfig
from model_zoo.nanogpt.model import GPTConfig
from model_zoo.nanogpt.startup import MERGED_TOKENS, merged_micro_batches


@pytest.mark.parametrize(
    ("settings", "device", "merged"),
    [
        ({}, "cpu", MERGED_TOKENS // (4 * 64)),
        ({"micro_batch": 32}, "cpu", 1),
        ({"elastic": ElasticConfig(exact=True)}, "cpu", 1),
        ({"model": GPTConfig(block_size=64, dropout=0.1)}, "cpu", 1),
        ({}, "cuda", 1),
    ],
)
def test_micro_batches_are_merged_only_where_no_number_depends_on_it(
    settings: dict[str, Any], device: str, merged: int
) -> None:
    config = TrainConfig(**({"model": GPTConfig(block_size=64), "micro_batch": 4} | settings))
    world = World(0, 1, 0, "single", torch.device(device), elastic=False)
    assert merged_micro_batches(config, world) == merged
