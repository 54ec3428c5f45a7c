"""Starts a run from existing weights: `elastic-gpt train PRESET --init-from PLACE`.

PLACE is anything that loading.py reads: a Hugging Face GPT-2, nanoGPT's ckpt.pt, one of our runs.
It is needed only until the first checkpoint of the new run. Its fingerprint is part of the run's
identity.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import yaml

from elastic_gpt.contract import CONFIG
from elastic_gpt.settings import SettingsError
from elastic_gpt.storage import Unreachable
from model_zoo.nanogpt.config import TrainConfig
from model_zoo.nanogpt.layouts import fit
from model_zoo.nanogpt.loading import Weights, find_tokenizer, local, read_weights
from model_zoo.nanogpt.model import GPT
from model_zoo.nanogpt.vocabulary import vocabulary_fingerprint
from prepare import data
from prepare.streams import TransferError
from prepare.tokens import Meta

FINGERPRINT = "init_from_fingerprint"
FORMS = {"gelu": "tanh", "gelu_erf": "erf"}


def check_start(config: TrainConfig, meta: Meta) -> TrainConfig:
    """`config` with its vocabulary size filled in. Reads the weights of a new run and checks that they fit.

    If the settings leave the vocabulary size open, it is that of the data, or of the weights if
    theirs is larger (padded). Raises SettingsError that names everything that does not fit.
    """
    size = config.model.vocab_size or meta.vocab_size
    if config.init_from is None:
        return _with_vocabulary(config, size)
    before = _settings(config.run_dir)
    if before is not None:  # the run has begun, so the size is decided, and PLACE may have gone
        return _with_vocabulary(config, config.model.vocab_size or before.get("model", {}).get("vocab_size", size))
    weights = _read(config, meta)
    config = _with_vocabulary(config, config.model.vocab_size or max(size, weights.config.vocab_size))
    _fit(config, weights)
    return config


def fingerprint(config: TrainConfig, before: dict[str, Any]) -> str | None:
    """Fingerprint of the weights that a run starts from; None for random ones. `before`: settings of the life before."""
    if config.init_from is None:
        return None
    if before.get("init_from") == config.init_from:
        return before.get(FINGERPRINT)
    return _read(config).digest()


def start(model: GPT, config: TrainConfig) -> None:
    """Replace the model's random parameters. Raises SettingsError if the run began with other weights."""
    weights = _read(config)
    expected = (_settings(config.run_dir) or {}).get(FINGERPRINT)
    if weights.digest() != expected:
        raise SettingsError(
            f"init_from {config.init_from} holds other weights ({weights.digest()}) than when the run in {config.run_dir}"
            f" was made ({expected}): put those back, or train into another --run-dir"
        )
    model.load_state_dict(_fit(config, weights))
    note, have = "", weights.config.activation
    if have != config.model.activation:
        note = (
            f" (trained with the {FORMS[have]} form of GELU, this run computes the {FORMS[config.model.activation]} form:"
            f" nearly the same; --model.activation {have} is the very same)"
        )
    print(f"starts from {weights.source}{note}", flush=True)


def _read(config: TrainConfig, meta: Meta | None = None) -> Weights:
    assert config.init_from is not None
    try:
        with local(config.init_from) as place:
            weights = read_weights(place)
            if meta is not None:
                _check_ids(place, config)
            return weights
    except SettingsError:
        raise
    except TransferError as error:
        raise Unreachable(f"init_from: {error}") from error
    except (ValueError, OSError) as error:
        raise SettingsError(f"init_from {config.init_from}: {error}") from error


def _check_ids(place: Path, config: TrainConfig) -> None:
    """Raises SettingsError if ids mean different tokens in the data and for the weights. Says so if that is not known."""
    theirs, ours = find_tokenizer(place), data.find_tokenizer(config.data.dir)
    if theirs is None or ours is None:
        print(
            f"note: no tokenizer to compare in {place}: its ids are taken for the data's", file=sys.stderr, flush=True
        )
    elif vocabulary_fingerprint(theirs) != vocabulary_fingerprint(ours):
        raise SettingsError(
            f"init_from {config.init_from} was trained with another tokenizer ({theirs.name}, {theirs.vocab_size} ids)"
            f" than {config.data.dir} has ({ours.name}, {ours.vocab_size} ids): prepare the text with that one"
        )


def _fit(config: TrainConfig, weights: Weights) -> dict[str, Any]:
    try:
        return fit(weights.state, weights.config, config.model)
    except ValueError as error:
        raise SettingsError(f"init_from {config.init_from} does not fit: {error}") from error


def _with_vocabulary(config: TrainConfig, size: int) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def _settings(run: Path) -> dict[str, Any] | None:
    """The settings in config.yaml; None for a new run. A damaged file is reported when the run is opened."""
    try:
        found = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None
