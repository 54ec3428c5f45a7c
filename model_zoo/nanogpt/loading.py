"""Loads a model from a run directory, an exported folder, a checkpoint of nanoGPT, or the URL of any of them.

    RUN/                  config.yaml, checkpoints/, tokenizer/             as training leaves it
    FOLDER/               config.json, model.safetensors (or .bin)          Hugging Face's GPT-2, ours or anybody's
    FOLDER/ckpt.pt        model_args and model                              nanoGPT's

No code in these files is run: they are safetensors, YAML, JSON, and pickles with `weights_only`.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from elastic_gpt.checkpoint import NoCheckpointYet, checkpoints_place, load_model_weights
from elastic_gpt.contract import CONFIG, MANIFEST, TENSORBOARD, TOKENIZER
from elastic_gpt.settings import field_types
from elastic_gpt.state import broken
from model_zoo.nanogpt.layouts import GELUS, DoesNotFit, import_state
from model_zoo.nanogpt.model import GPT, GPTConfig
from model_zoo.nanogpt.vocabulary import vocabulary_fingerprint
from prepare import data
from prepare.streams import store_of, unreachable
from prepare.tokenizer import Tokenizer, gpt2

GELU: dict[str, Literal["gelu", "gelu_erf"]] = {  # Hugging Face's names of the two forms
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_erf",
}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Weights:
    """A model's parameters with our names, and its shape."""

    config: GPTConfig
    state: dict[str, Tensor]
    step: int | None
    """Updates done; None if not known."""
    source: str
    """In words, what it was loaded from."""
    checkpoints: str | None = None
    """Where a run's newer checkpoints will be: a folder or a URL."""
    vocabulary: str | None = None
    """Fingerprint of the vocabulary that it was trained with; None if not known."""

    def digest(self) -> str:
        """16 hex digits, the same for the same parameters, whatever file they come from."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.config) | {"dropout": 0}, sort_keys=True).encode())
        for name, tensor in sorted(self.state.items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be used."""

    model: GPT
    """The model in eval mode, on the requested device."""
    tokenizer: Tokenizer | None
    """Its tokenizer; None if the place has none that is known here."""
    step: int | None
    description: str
    """One line for a person: which step, how large, on what."""
    checkpoints: str | None
    """Where a run's newer checkpoints will be: a folder or a URL; None for other models."""


def load(place: Path | str, device: torch.device, tokenizer: Path | None = None) -> Loaded:
    """Load the model and tokenizer at `place`; of a run, the newest whole checkpoint.

    `tokenizer`: a folder with the tokenizer to use instead. Raises ValueError, one line with the
    cure, if there is no model, or the model and the tokenizer do not belong together.
    """
    with local(place) as folder:
        weights = read_weights(folder)
        model = build(weights).to(device).eval()
        found = find_tokenizer(folder, tokenizer)
        if found is not None:
            _check_tokenizer(found, tokenizer or place, weights.config)
        if found is not None and tokenizer is not None:
            _refuse_another_vocabulary(found, tokenizer, weights, folder, place)
    step = "" if weights.step is None else f" of step {weights.step}"
    description = f"model{step}, {model.parameter_count():,} parameters, on {device}"
    checkpoints = weights.checkpoints and weights.checkpoints.replace(str(folder), str(place).rstrip("/"))
    return Loaded(model, found, weights.step, description, checkpoints)


def _check_tokenizer(tokenizer: Tokenizer, where: Path | str, config: GPTConfig) -> None:
    """Raise ValueError if the tokenizer has ids that the model does not know."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer in {where} has {tokenizer.vocab_size} ids, the model {config.vocab_size}; "
            "give --tokenizer DIR, the folder of the data that the model was trained on"
        )


def _refuse_another_vocabulary(
    given: Tokenizer, where: Path, weights: Weights, folder: Path, place: Path | str
) -> None:
    """Raise ValueError if the tokenizer `given`, from `where`, has another vocabulary than the model in `folder`.

    `place`: what the user calls the folder.
    """
    has_own = (folder / TOKENIZER).is_dir()
    trained = weights.vocabulary
    if not trained and (own := find_tokenizer(folder)):  # a run of version 0.1.0 has no fingerprint
        trained = vocabulary_fingerprint(own)
    if not trained:
        print(f"warning: {place} does not say which vocabulary it was trained with", file=sys.stderr)
    elif vocabulary_fingerprint(given) != trained:
        cure = "name the folder of the data that the model was trained on"
        if has_own:
            cure = f"leave --tokenizer out, {str(place).rstrip('/')}/{TOKENIZER} is the model's"
        raise ValueError(f"the tokenizer in {where} has another vocabulary than the model was trained with: {cure}")


def build(weights: Weights) -> GPT:
    """The model with a copy of these weights. Raises ValueError if their names or shapes do not fit its configuration."""
    with torch.device("meta"):
        model = GPT(weights.config)  # only names and shapes: the weights are assigned below
    # safetensors maps the file into memory. Who cuts that file, or deletes it on NFS, would end the process (SIGBUS).
    state = {name: tensor.clone() for name, tensor in weights.state.items()}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{weights.source}: not the model in its configuration ({_line(error)}); restore the file that fits"
        ) from error
    return model


def read_weights(place: Path) -> Weights:
    """Read the parameters in a run directory, a Hugging Face folder, or a nanoGPT checkpoint.

    Raises ValueError if there are none, or they are not finite.
    """
    if (place / "config.json").is_file():
        weights = _huggingface(place)
    elif place.is_file() or (place / "ckpt.pt").is_file():
        weights = _nanogpt(place if place.is_file() else place / "ckpt.pt")
    else:
        return _run(place)  # whether it is finite is checked when it is read
    if weights.state and (name := broken(weights.state)):
        raise ValueError(f"{weights.source} is a broken model, {name} is not finite: take it from an older checkpoint")
    return weights


@contextlib.contextmanager
def local(place: Path | str) -> Iterator[Path]:
    """A context with the path of `place`; for a URL, that of a temporary copy. Raises DataError or TransferError."""
    if "://" not in str(place):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="elastic-gpt-") as made:
        copy = str(Path(made).resolve())
        files, root = store_of(str(place).rstrip("/"))
        try:
            names = [name.removeprefix(root).lstrip("/") for name in files.find(root)]
            if not names:
                files.info(root)  # raises an error that says why
            for name in _needed(names):
                target = Path(copy, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                files.get_file(f"{root}/{name}", str(target))
        except Exception as error:  # the libraries below fsspec have many kinds of errors
            raise unreachable(str(place), error) from error
        if not names:
            raise ValueError(f"there is nothing at {place}: check the address")
        try:
            yield Path(copy)
        except ValueError as error:  # the message should name the URL, not the copy
            if copy not in str(error):
                raise
            kind = NoCheckpointYet if isinstance(error, NoCheckpointYet) else ValueError
            raise kind(str(error).replace(copy, str(place).rstrip("/"))) from error


def _needed(names: list[str]) -> Iterator[str]:
    """The files to copy: of a run, without optimizers and older checkpoints; of other folders, all."""
    manifests = sorted(name for name in names if name.endswith(f"/{MANIFEST}") and "step_" in name)
    newest = manifests[-1].removesuffix(MANIFEST) if manifests else None
    for name in names:
        if "step_" in name and not (newest and name.startswith(newest)):
            continue
        if not name.startswith(f"{TENSORBOARD}/"):
            yield name


def _run(run: Path) -> Weights:
    step, state = load_model_weights(run)
    path = run / CONFIG
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        config = GPTConfig(**settings["model"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path} describes no model ({_line(error)}); restore the file that training wrote") from error
    place = checkpoints_place(run, settings.get("checkpoint", {}).get("dir"))
    return Weights(
        config, state, step, f"checkpoint of step {step}", place, vocabulary=settings.get("tokenizer_fingerprint")
    )


def _huggingface(folder: Path) -> Weights:
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.get("model_type") != "gpt2":
            raise DoesNotFit(f"{path} is of model_type {fields.get('model_type')!r}: only gpt2 is known here")
        n_embd, gelu = fields["n_embd"], fields.get("activation_function", "gelu_new")
        for name, value, known in (
            ("activation_function", gelu, tuple(GELU)),
            ("n_inner", fields.get("n_inner"), (None, 4 * n_embd)),
            ("layer_norm_epsilon", fields.get("layer_norm_epsilon", 1e-5), (1e-5,)),
            ("scale_attn_weights", fields.get("scale_attn_weights", True), (True,)),
            ("scale_attn_by_inverse_layer_idx", fields.get("scale_attn_by_inverse_layer_idx", False), (False,)),
            ("add_cross_attention", fields.get("add_cross_attention", False), (False,)),
        ):
            if value not in known:
                raise DoesNotFit(f"{path} has {name}={value!r}, which this model cannot express")
        size = fields.get("n_positions", fields.get("n_ctx"))
        config = GPTConfig(
            fields["vocab_size"], size, fields["n_layer"], fields["n_head"], n_embd, activation=GELU[gelu]
        )
    except DoesNotFit:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} describes no GPT-2 ({_line(error)})") from error
    state = import_state(_huggingface_tensors(folder), "huggingface")
    if fields.get("tie_word_embeddings", True):
        state.pop("lm_head.weight", None)
    else:
        config = dataclasses.replace(config, tied_head=False)
    step = fields.get("elastic_gpt_step")
    return Weights(config, state, step if isinstance(step, int) else None, f"Hugging Face GPT-2 {folder}")


def _huggingface_tensors(folder: Path) -> dict[str, Tensor]:
    files = [folder / "model.safetensors"]
    if (folder / INDEX).is_file():
        names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        files = [folder / Path(name).name for name in sorted(names)]
    try:
        if files[0].is_file():
            return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the weights in {folder} ({_line(error)}): copy them again") from error
    if (folder / "pytorch_model.bin").is_file():
        return _unpickled(folder / "pytorch_model.bin")
    raise ValueError(f"{folder} has neither model.safetensors nor pytorch_model.bin: the weights are missing")


def _nanogpt(path: Path) -> Weights:
    checkpoint = _unpickled(path)
    try:
        known = field_types(GPTConfig).keys()
        arguments = {name: value for name, value in checkpoint["model_args"].items() if name in known}
        # nanoGPT's own is the erf form; a model of ours says what it was trained with.
        mine = checkpoint.get("config", {}).get("activation")
        config = GPTConfig(**arguments, activation=mine if mine in GELUS else "gelu_erf")
        state = import_state(checkpoint["model"], "nanogpt")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no checkpoint of nanoGPT's ({_line(error)})") from error
    state.pop("lm_head.weight", None)  # it is always the token embedding
    step = checkpoint.get("iter_num")
    return Weights(config, state, step if isinstance(step, int) else None, f"nanoGPT's {path}")


def _unpickled(path: Path) -> Any:
    """Tensors and plain values in a file that torch.save wrote. No code in it is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # users can do nothing about warnings of an old file
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a broken file raises errors of many kinds
        # Torch's own message advises to run the code in it.
        why = type(error).__name__ if "weights_only" in str(error) else _line(error)[:200]
        raise ValueError(
            f"{path} cannot be read as weights alone ({why}): it is damaged, or holds code, which is not run"
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds no weights by name: give another file")
    return found


def find_tokenizer(place: Path, folder: Path | None = None) -> Tokenizer | None:
    """The tokenizer in `folder`, else the one beside the model, else GPT-2's if the model has its vocabulary."""
    if folder is not None:
        if not folder.is_dir():
            raise ValueError(
                f"there is no tokenizer folder {folder}; give --tokenizer DIR, the folder that prepare wrote"
            )
        return data.load_tokenizer(folder)
    if (place / TOKENIZER).is_dir():
        return data.find_tokenizer(place / TOKENIZER)
    return gpt2() if _is_gpt2(place) else None


def _is_gpt2(place: Path) -> bool:
    """Whether a Hugging Face folder's vocabulary is GPT-2's, by its merges."""
    try:
        if (place / "tokenizer.json").is_file():
            model = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))["model"]
            vocabulary, merges = model["vocab"], len(model["merges"])
        else:
            vocabulary = json.loads((place / "vocab.json").read_text(encoding="utf-8"))
            merges = len((place / "merges.txt").read_text(encoding="utf-8").splitlines()) - 1
    except (OSError, ValueError, KeyError, TypeError):
        return False
    # Only GPT-2 has 50,000 merges and these three ids.
    signs = {"!": 0, "Ġthe": 262, "<|endoftext|>": 50256}
    return merges >= 50_000 and len(vocabulary) == 50_257 and all(vocabulary.get(k) == i for k, i in signs.items())


def _line(error: Exception) -> str:
    """The message of an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
