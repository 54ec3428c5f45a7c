"""config.py: presets work as they are; settings that cannot work together say what can."""

import dataclasses
import itertools

import pytest

from elastic_gpt.settings import SettingsError, parse, preset_names
from model_zoo.nanogpt.config import PRESETS, OptimizerConfig, TrainConfig
from model_zoo.nanogpt.shape import GPTConfig


def test_the_learning_rate_warms_up_and_decays() -> None:
    optimizer = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10)
    rates = [optimizer.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.55)
    assert optimizer.rate(100, 100) == pytest.approx(0.1)
    assert optimizer.rate(5000, 100) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("preset", "layers", "width", "tokens_per_step"),
    [
        ("kubeflow_toy", 1, 128, 1_024),  # Kubeflow's example
        ("shakespeare_char", 4, 128, 768),  # nanoGPT's README, on a CPU
        ("gpt2_124m", 12, 768, 491_520),
    ],
)
def test_the_presets_have_the_sizes_they_are_named_for(
    preset: str, layers: int, width: int, tokens_per_step: int
) -> None:
    config = parse(TrainConfig, [preset], presets=PRESETS, prog="x", environment={})
    assert (config.model.n_layer, config.model.n_embd, config.tokens_per_step) == (layers, width, tokens_per_step)
    if preset == "gpt2_124m":
        assert dataclasses.replace(config.model, vocab_size=50257) == GPTConfig()
    if preset == "kubeflow_toy":
        assert (config.global_batch, config.model.block_size, config.model.n_head, config.steps) == (16, 64, 4, 100)
        assert config.observe.interval == 10


@pytest.mark.parametrize("name", preset_names(PRESETS))
def test_every_preset_is_accepted(name: str) -> None:
    config = parse(TrainConfig, [name], presets=PRESETS, prog="x", environment={})
    assert config.global_batch == config.micro_batch * config.micro_batches


@pytest.mark.parametrize(
    ("flag", "cure"),
    [
        ("--micro-batch=5", "take 4"),
        ("--steps=0", "at least 1"),
        ("--checkpoint.keep=0", "at least 1"),
        ("--optimizer.learning-rate=-3", "must be above 0"),
        ("--optimizer.learning-rate -3", "must be above 0"),
        ("--optimizer.clip=-1", "must not be negative"),
        ("--optimizer.beta2=1", "from 0 to below 1"),
        ("--optimizer.decay-steps=0", "at least 1"),
        ("--elastic.grace-seconds=-1", "must not be negative"),
        ("--seed=9223372036854775808", "must fit 64 bits"),
        (f"--steps={2**53 + 1}", "steps and global_batch are at most 9,007,199,254,740,992: take less"),
        ("--dtype=float16 --elastic.exact", "not with dtype float16"),
        ("--elastic.traffic=bfloat16 --elastic.exact", "leave one of the two out"),
    ],
)
def test_settings_that_cannot_work_together_say_what_can(flag: str, cure: str) -> None:
    with pytest.raises(SettingsError, match=cure):
        parse(TrainConfig, ["debug_cpu", *flag.split()], presets=PRESETS, prog="x", environment={})


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--steps=100 --optimizer.warmup-steps=100", "does not reach"),
        ("--steps=100 --optimizer.decay-steps=10 --optimizer.warmup-steps=20", "falls to"),
        ("--optimizer.min-learning-rate=1", "rises after the warm-up"),
    ],
)
def test_a_learning_rate_that_cannot_take_its_course_is_told(flags: str, word: str) -> None:
    settled = parse(TrainConfig, ["debug_cpu", *flags.split()], presets=PRESETS, prog="x", environment={})
    assert [word in note for note in settled.notes()] == [True]


@pytest.mark.parametrize("name", preset_names(PRESETS))
def test_a_preset_as_it_is_needs_no_note(name: str) -> None:
    assert parse(TrainConfig, [name], presets=PRESETS, prog="x", environment={}).notes() == []
