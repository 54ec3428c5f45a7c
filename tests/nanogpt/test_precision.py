"""precision.py: on a CPU, the type of products is measured once and kept, and never changes exact mode."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from elastic_gpt.settings import SettingsError
from elastic_gpt.world import World
from model_zoo.nanogpt import precision
from model_zoo.nanogpt.config import ElasticConfig, TrainConfig
from model_zoo.nanogpt.model import GPTConfig
from tests.conftest import TINY, elastic_gpt

WORLD = World(0, 1, 0, "single", torch.device("cpu"), elastic=False)
WIDE = GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=384)


def settled(run: Path, monkeypatch: pytest.MonkeyPatch, gain: float | None, **settings: Any) -> str:
    """The dtype of a run on a CPU where bfloat16 is `gain` times as fast; None: nothing may be measured."""

    def measured(_config: TrainConfig) -> float:
        assert gain is not None, "measured"
        return gain

    monkeypatch.setattr(precision, "measured_gain", measured)
    return precision.settle(TrainConfig(run_dir=run, **({"model": WIDE} | settings)), WORLD.device).dtype


@pytest.mark.parametrize(("gain", "dtype"), [(2.0, "bfloat16"), (1.1, "float32"), (0.25, "float32")])
def test_a_new_run_takes_what_is_much_faster_and_says_so(
    gain: float, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert settled(tmp_path, monkeypatch, gain) == dtype
    assert capsys.readouterr().out.startswith(f"dtype: {dtype} for the whole run")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])  # auto: a run that began before CPUs were measured
def test_a_run_goes_on_in_the_type_it_has(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"dtype": dtype}))
    assert settled(tmp_path, monkeypatch, None) == dtype
    before = TrainConfig(dtype=dtype)  # type: ignore[arg-type]
    assert precision.dtype(before, WORLD.device) == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)


def test_what_the_user_says_exact_mode_and_narrow_models_need_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settled(tmp_path, monkeypatch, None, dtype="bfloat16") == "bfloat16"
    exact = TrainConfig(elastic=ElasticConfig(exact=True))
    assert settled(tmp_path, monkeypatch, None, elastic=exact.elastic) == "auto"
    assert precision.dtype(exact, WORLD.device) == torch.float32
    narrow = dataclasses.replace(WIDE, n_embd=64)
    assert settled(tmp_path, monkeypatch, None, model=narrow) == "float32"


def test_the_type_is_known_before_there_is_a_world_unless_a_new_run_has_to_measure(tmp_path: Path) -> None:
    def known(run: Path, **settings: Any) -> bool:
        return precision.is_known(TrainConfig(run_dir=run, **({"model": WIDE} | settings)), WORLD.device)

    assert not known(tmp_path)
    assert known(tmp_path, dtype="bfloat16")
    assert known(tmp_path, elastic=ElasticConfig(exact=True))
    (tmp_path / "config.yaml").write_text("dtype: bfloat16\n")
    assert known(tmp_path)


def test_a_damaged_config_is_not_taken_for_a_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("]")
    with pytest.raises(SettingsError, match="damaged"):
        settled(tmp_path, monkeypatch, None)


def test_the_measurement_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert precision.measured_gain(TrainConfig(model=WIDE)) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_stores_its_type_and_a_run_of_old_keeps_float32(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", "debug_cpu", *TINY, "--elastic.exact=false", f"--data.dir={data}", f"--run-dir={run}"]
    elastic_gpt(*words, "--steps=2", "--dtype=bfloat16")
    done = elastic_gpt(*words, "--steps=4")
    assert "bfloat16 on cpu" in done.stdout
    config = run / "config.yaml"
    assert yaml.safe_load(config.read_text())["dtype"] == "bfloat16"
    config.write_text(config.read_text().replace("dtype: bfloat16", "dtype: auto"))
    assert "float32 on cpu" in elastic_gpt(*words, "--steps=6").stdout
