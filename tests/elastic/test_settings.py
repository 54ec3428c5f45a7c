"""settings.py: a typo in a preset, a variable or a flag gets the nearest right name in one line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from elastic_gpt.settings import SettingsError, parse, tree
from model_zoo.nanogpt.config import PRESETS, TrainConfig


@dataclass(frozen=True)
class Model:
    n_layer: int = 3
    bias: bool = True


@dataclass(frozen=True)
class Settings:
    steps: int = 10
    dtype: Literal["auto", "float32"] = "auto"
    limit: int | None = None
    run: Path = Path("run")
    model: Model = field(default_factory=Model)


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text("steps: 20\nmodel: {n_layer: 4, bias: false}\n")
    return tmp_path


def settle(presets: Path, *flags: str, **environment: str) -> Settings:
    return parse(Settings, ["small", *flags], presets=presets, prog="x", environment=environment)


def test_flags_win_over_variables_and_variables_over_the_preset(presets: Path) -> None:
    assert settle(presets) == Settings(steps=20, model=Model(4, False))
    assert settle(presets, EGPT__STEPS="30", EGPT__MODEL__N_LAYER="5").model.n_layer == 5
    settled = settle(presets, "--steps", "40", "--model.n-layer=6", EGPT__STEPS="30", EGPT__MODEL__N_LAYER="5")
    assert (settled.steps, settled.model.n_layer) == (40, 6)


def test_the_last_of_two_equal_flags_wins(presets: Path) -> None:
    assert settle(presets, "--steps=1", "--steps", "2", "--model.n_layer=7", "--model.n-layer=8").model.n_layer == 8


def test_booleans_are_taken_as_people_write_them(presets: Path) -> None:
    assert settle(presets, "--model.bias").model.bias is True
    assert settle(presets, "--model.bias", "true", "--model.bias=false").model.bias is False
    assert settle(presets, EGPT__MODEL__BIAS="True").model.bias is True


@pytest.mark.parametrize(
    ("flags", "variables", "preset", "offending", "nearest", "where"),
    [
        (["--model.n-layr=3"], {}, "", "model.n_layr", "model.n_layer", "flags"),
        (["--model.nl=3"], {}, "", "model.nl", "model.n_layer", "flags"),
        (["--n_layer=3"], {}, "", "n_layer", "model.n_layer", "flags"),
        ([], {"EGPT__MODEL__N_LAYRE": "3"}, "", "model.n_layre", "model.n_layer", "EGPT__MODEL__N_LAYRE"),
        ([], {"EGPT__STEP": "3"}, "", "step", "steps", "EGPT__STEP"),
        ([], {}, "stpes: 3", "stpes", "steps", "small.yaml"),
        ([], {}, "model: {biass: true}", "model.biass", "model.bias", "small.yaml"),
    ],
)
def test_a_typo_names_itself_its_place_and_the_nearest_name_in_one_line(
    presets: Path, flags: list[str], variables: dict[str, str], preset: str, offending: str, nearest: str, where: str
) -> None:
    if preset:
        (presets / "small.yaml").write_text(preset)
    with pytest.raises(SettingsError) as caught:
        settle(presets, *flags, **variables)
    message = str(caught.value)
    assert f"'{offending}'" in message
    assert f"did you mean '{nearest}'?" in message
    assert where in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("flags", "variables", "words"),
    [
        (["--model.n-layer", "three"], {}, ["--model.n-layer", "'three'", "the flags"]),
        ([], {"EGPT__DTYPE": "float23"}, ["--dtype", "'float23'", "'float32'", "EGPT__DTYPE"]),
        (["--steps"], {}, ["--steps", "needs a value", "INT"]),
        (["steps", "3"], {}, ["'steps'", "--steps 100"]),
        ([], {"EGPT_STEPS": "3"}, ["EGPT_STEPS", "EGPT__STEPS"]),
    ],
)
def test_a_bad_value_names_the_flag_and_where_it_came_from(
    presets: Path, flags: list[str], variables: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        settle(presets, *flags, **variables)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_names_the_nearest_one(presets: Path) -> None:
    with pytest.raises(SettingsError, match="did you mean 'small'"):
        parse(Settings, ["smal"], presets=presets, prog="x", environment={})
    with pytest.raises(SettingsError, match="name a preset first"):
        parse(Settings, ["--steps=3"], presets=presets, prog="x", environment={})


def test_a_preset_that_is_not_yaml_is_named_as_such(presets: Path) -> None:
    (presets / "small.yaml").write_text("steps: [1,")
    with pytest.raises(SettingsError, match="is not YAML"):
        settle(presets)


def test_what_is_dumped_can_be_a_preset_again(presets: Path) -> None:
    settled = settle(presets, "--run", "elsewhere", "--limit=3")
    (presets / "again.yaml").write_text(yaml.safe_dump(tree(settled)))
    assert parse(Settings, ["again"], presets=presets, prog="x", environment={}) == settled


@pytest.mark.parametrize(
    ("flags", "variables", "note"),
    [
        (["--steps=1", "--steps", "2"], {}, "note: --steps is given twice: 2 is taken, not 1\n"),
        (["--steps=1"], {"EGPT__STEPS": "3"}, "note: variable EGPT__STEPS has no effect: the flags say --steps 1\n"),
        (["--steps=1", "--steps=1"], {"EGPT__STEPS": "1"}, ""),
    ],
)
def test_a_setting_that_another_one_overrides_is_told(
    presets: Path, flags: list[str], variables: dict[str, str], note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settle(presets, *flags, **variables)
    assert capsys.readouterr().err == note


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("steps: 1\nsteps: 2\n", "'steps' stands twice in one section"),
        ("steps: [1, 2]", "setting 'steps' in preset .* is a list: give one value"),
        ("[" * 5000, "is not YAML: too deeply nested"),
        ("\x00", "is not YAML"),
        ("3", "holds no settings"),
        ("limit: " + "9" * 5000, "limit"),
        ("x: " + "y" * (1 << 20), "is too large to be one"),
    ],
)
def test_a_preset_that_is_something_else_is_refused_in_one_line(presets: Path, preset: str, words: str) -> None:
    (presets / "small.yaml").write_text(preset)
    with pytest.raises(SettingsError, match=words) as caught:
        settle(presets)
    assert "\n" not in str(caught.value)


def test_a_section_whose_lines_are_comments_sets_nothing(presets: Path) -> None:
    (presets / "small.yaml").write_text("model:\n  # n_layer: 4\nsteps: 5\n")
    assert settle(presets) == Settings(steps=5)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400"])
def test_a_number_that_is_not_finite_is_refused(value: str) -> None:
    for name in ("optimizer.learning-rate", "elastic.timeout-seconds", "optimizer.beta1"):
        with pytest.raises(SettingsError, match=name.replace("-", "[-_]")):
            parse(TrainConfig, ["debug_cpu", f"--{name}", value], presets=PRESETS, prog="x", environment={})
