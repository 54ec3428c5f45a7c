"""A run that starts from weights that are there already: `elastic-gpt train PRESET --init-from PLACE`.

PLACE is whatever loading.py reads: a Hugging Face GPT-2, nanoGPT's ckpt.pt, a run of ours. It is needed until the run's
first checkpoint, and not after; its fingerprint is part of the run's identity.
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
    """`config` with its vocabulary decided; the weights of a new run are read, and have to fit.

    The vocabulary that the settings leave open is the data's, or the weights' where that is larger (a padded one).
    Raises SettingsError, with all misfits by name.
    """
    size = config.model.vocab_size or meta.vocab_size
    if config.init_from is None:
        return _with_vocabulary(config, size)
    before = _settings(config.run_dir)
    if before is not None:  # the run has begun: it decided then, and PLACE may be gone
        return _with_vocabulary(config, config.model.vocab_size or before.get("model", {}).get("vocab_size", size))
    weights = _read(config, meta)
    config = _with_vocabulary(config, config.model.vocab_size or max(size, weights.config.vocab_size))
    _fit(config, weights)
    return config


def fingerprint(config: TrainConfig, before: dict[str, Any]) -> str | None:
    """Of the weights that a run starts from; None where it starts from random ones. `before`: its settings so far."""
    if config.init_from is None:
        return None
    if before.get("init_from") == config.init_from:
        return before.get(FINGERPRINT)
    return _read(config).digest()


def start(model: GPT, config: TrainConfig) -> None:
    """Replace the model's random parameters. Raises SettingsError where the weights are not those the run began with."""
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
    """Ids have to mean in the data what they mean to the weights; where nobody can say, that is told."""
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
    """config.yaml of a run that has begun; a damaged one is told where the run is opened."""
    try:
        found = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None
