"""baseline.py: the other systems of a drill train what ours does, each sequence once, and find their state again."""

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from elastic_gpt.drill import systems
from elastic_gpt.settings import parse
from model_zoo.nanogpt import baseline
from model_zoo.nanogpt.baseline import DiskCheckpoint, Training, _batches
from model_zoo.nanogpt.config import PRESETS, TrainConfig
from prepare.data import open_split


@pytest.fixture(scope="module")
def training(data: Path) -> Training:
    return Training(data)


def test_both_sides_of_a_drill_have_one_model_one_order_and_the_same_pace(data: Path, training: Training) -> None:
    ours = parse(TrainConfig, systems.Ours.training(data), presets=PRESETS, prog="x", environment={})
    assert training.model.config == dataclasses.replace(ours.model, vocab_size=training.model.config.vocab_size)
    assert (training.length, training.global_batch) == (ours.model.block_size, ours.global_batch)
    assert (training.seed, training.rate) == (ours.seed, ours.optimizer.learning_rate)
    assert ours.checkpoint.interval == baseline.DISK_INTERVAL
    assert ours.elastic.snapshot_interval == baseline.MEMORY_INTERVAL


def test_a_batch_is_sequences_and_the_tokens_that_follow(data: Path, training: Training) -> None:
    inputs, targets = training.batch([5, 0])
    tokens = torch.from_numpy(open_split(data, "train")[: 6 * training.length + 1].astype("int64"))
    assert inputs.tolist() == [tokens[5 * training.length : -1].tolist(), tokens[: training.length].tolist()]
    assert torch.equal(targets[:, :-1], inputs[:, 1:])
    assert targets[0, -1] == tokens[-1]


class Sampler:
    """Ten ids, in an order of each epoch's own."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[int]:
        return iter(range(100 * self.epoch, 100 * self.epoch + 10))


def test_a_replica_group_that_comes_back_goes_on_in_its_data_where_it_was() -> None:
    drawn = list(islice(_batches(Sampler(), 4, 0), 7))
    assert [ids[0] for _, ids in drawn] == [0, 4, 8, 100, 104, 108, 200]
    assert drawn[2][1] == [8, 9]  # the rest of an epoch
    for position, _ in drawn[:-1]:
        assert next(_batches(Sampler(), 4, position)) == drawn[position]


def test_a_checkpoint_on_disk_is_written_by_the_first_rank_at_its_interval_and_found_again(tmp_path: Path) -> None:
    every = baseline.DISK_INTERVAL
    assert DiskCheckpoint(tmp_path).load() == {}
    for step, first in ((every - 1, True), (every, False)):
        DiskCheckpoint(tmp_path).save(step, {"step": step}, first=first)
        assert list(tmp_path.iterdir()) == []
    DiskCheckpoint(tmp_path).save(every, {"step": every}, first=True)
    assert DiskCheckpoint(tmp_path).load() == {"step": every}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
