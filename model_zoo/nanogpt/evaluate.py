"""Measures a model on held-out text: loss, perplexity, bits per byte.

    elastic-gpt evaluate RUN                                all of val.bin, in the blocks that training uses
    elastic-gpt evaluate RUN --stride 128                   each token with at least block_size - 128 tokens before it
    elastic-gpt evaluate FOLDER --data data --json          any model that can be loaded, any prepared data

The loss is in nats a token and depends on the tokenizer; bits per byte do not, so models with
different tokenizers can be compared by them.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import yaml
from rich.console import Console
from rich.progress import track

from elastic_gpt.contract import CONFIG
from elastic_gpt.devices import find_device
from elastic_gpt.evaluator import spread
from elastic_gpt.ledger import strict_json
from elastic_gpt.mirror import here
from model_zoo.nanogpt.config import DataConfig
from model_zoo.nanogpt.loading import load
from model_zoo.nanogpt.model import GPT
from model_zoo.nanogpt.places import data_here
from model_zoo.nanogpt.vocabulary import vocabulary_fingerprint
from prepare.data import find_tokenizer, open_split, read_meta
from prepare.frontdoor import DONE, Parser, command, whole
from prepare.tokenizer import Tokenizer

IGNORED = -100  # cross_entropy ignores this target


@dataclass(frozen=True)
class Score:
    """The result of an evaluation."""

    loss: float
    """Mean cross-entropy, nats per token."""
    perplexity: float
    bits_per_byte: float | None
    """Bits per byte of UTF-8 that the scored tokens stand for; an end of text counts no byte. None if not known."""
    tokens: int
    """Number of scored tokens."""
    left_out: int
    """Number of tokens that were not scored: the first one, which has no context; those after the last full block; and those
    that --sequences leaves out."""


@command
def main(argv: Sequence[str] | None = None, prog: str = "elastic-gpt evaluate") -> int:
    """The command; returns its exit code (prepare/frontdoor.py)."""
    options = _parser(prog).parse_args(argv)
    loaded = load(options.model, find_device(options.device), options.tokenizer)
    data = data_here(DataConfig(dir=options.data or _data_of(options.model)))
    _check_same_tokenizer(loaded.tokenizer, data, loaded.model.config.vocab_size)
    print(loaded.description, file=sys.stderr)
    score = evaluate(
        loaded.model,
        open_split(data, options.split),
        loaded.tokenizer,
        stride=options.stride,
        sequences=options.sequences,
        batch=options.batch,
        progress=sys.stderr.isatty(),
    )
    if options.json:
        facts = {"model": str(options.model), "step": loaded.step, "data": str(data), "split": options.split}
        print(strict_json(facts | asdict(score)))
        return DONE
    bits = "no bits per byte: not all text that the tokens stand for is known"
    if score.bits_per_byte is not None:
        bits = f"{score.bits_per_byte:.4f} bits per byte"
    print(f"loss {score.loss:.4f} nats a token, perplexity {score.perplexity:.2f}, {bits}")
    print(f"{score.tokens:,} tokens of {data} {options.split} scored, {score.left_out:,} left out", file=sys.stderr)
    return DONE


@torch.no_grad()
def evaluate(
    model: GPT,
    tokens: npt.NDArray[np.unsignedinteger],
    tokenizer: Tokenizer | None = None,
    *,
    stride: int | None = None,
    sequences: int | None = None,
    batch: int = 8,
    progress: bool = False,
) -> Score:
    """Score a model in eval mode on `tokens`, the ids of a split.

    Args:
        tokenizer: needed for bits per byte.
        stride: tokens from the beginning of one context to the next, at most block_size (the default: no overlap).
            In each context but the first, only the last `stride` tokens are scored, so that none is scored twice.
        sequences: how many contexts, evenly spread as in training; None: all.
        batch: contexts in one forward pass.
        progress: whether to show a progress bar.

    Raises ValueError if the split is too short for one context, or the stride is not possible.
    """
    block_size = model.config.block_size
    stride = stride or block_size
    if not 1 <= stride <= block_size:
        raise ValueError(f"--stride is {stride}: give 1 to {block_size}, the model's block size")
    there = max(0, (len(tokens) - 1 - block_size) // stride + 1)
    if there == 0:
        raise ValueError(f"the split has {len(tokens):,} tokens, one context needs {block_size + 1}: prepare more text")
    ids = np.arange(there) if sequences is None else spread(there, sequences, batch)
    device = model.wte.weight.device
    total, counts = 0.0, np.zeros(model.config.vocab_size, dtype=np.int64)
    starts = range(0, len(ids), batch)
    bar = track(starts, "evaluate", console=Console(stderr=True), transient=True, disable=not progress)
    for start in bar:
        chosen = ids[start : start + batch]
        block = tokens[chosen[:, None] * stride + np.arange(block_size + 1)].astype(np.int64)
        targets = block[:, 1:].copy()
        targets[chosen > 0, : block_size - stride] = IGNORED
        inputs = torch.from_numpy(block[:, :-1].copy()).to(device)
        total += model(inputs, torch.from_numpy(targets).to(device)).double().item()
        counts += np.bincount(targets[targets != IGNORED], minlength=len(counts))
    scored = int(counts.sum())
    loss = total / scored
    size = _bytes(counts, tokenizer)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Score(loss, perplexity, total / math.log(2) / size if size else None, scored, len(tokens) - scored)


def _bytes(counts: npt.NDArray[np.int64], tokenizer: Tokenizer | None) -> int | None:
    """Bytes of UTF-8 that the ids stand for. `counts`: how often each id occurs. None without a tokenizer, or with <unk>."""
    if tokenizer is None or (tokenizer.name == "word" and counts[0]):  # id 0 is <unk>, for a word of any length
        return None
    used = [id_ for id_ in np.flatnonzero(counts).tolist() if id_ != tokenizer.eot_id]
    return sum(int(counts[id_]) * len(tokenizer.decode_bytes([id_])) for id_ in used)


def _data_of(run: str) -> Path:
    """The folder of the data that a run was trained on."""
    path = here(Path(run)) / CONFIG
    try:
        return Path(yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["dir"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{run} does not say what data it was trained on: give --data DIR") from error


def _check_same_tokenizer(tokenizer: Tokenizer | None, data: Path, vocab_size: int) -> None:
    """Raises ValueError if the data has ids of another tokenizer: the result would mean nothing."""
    meta = read_meta(data)
    if meta.vocab_size > vocab_size:
        raise ValueError(
            f"{data} has {meta.vocab_size} ids, the model knows {vocab_size}: give the data it was trained for"
        )
    theirs = find_tokenizer(data)
    if tokenizer is None or theirs is None:
        return  # the size is all there is to compare
    if vocabulary_fingerprint(theirs) != vocabulary_fingerprint(tokenizer):
        raise ValueError(
            f"{data} was prepared with another tokenizer ({theirs.name}, {theirs.vocab_size} ids) than the model's"
            f" ({tokenizer.name}, {tokenizer.vocab_size} ids): give the data it was trained for"
        )


EXAMPLES = """\
examples:
  %(prog)s run                                        all of val.bin, in the blocks that training uses
  %(prog)s run --stride 128                           each token after at least block_size - 128 others
  %(prog)s exported --data data --json                any model that can be loaded, any prepared data
"""


def _parser(prog: str) -> Parser:
    description = "Loss, perplexity and bits per byte of a model on held-out text."
    parser = Parser(prog=prog, description=description, epilog=EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="run directory, exported folder, nanoGPT's ckpt.pt, or a URL")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="prepared data, or its URL (what the run was trained on)"
    )
    parser.add_argument("--split", default="val", choices=("train", "val"), help="which side of it (val)")
    parser.add_argument("--stride", type=whole(1), metavar="N", help="tokens between two contexts (the block size)")
    parser.add_argument("--sequences", type=whole(1), metavar="N", help="score N contexts, evenly spread, not all")
    parser.add_argument("--batch", type=whole(1), default=8, metavar="N", help="contexts in one forward pass (8)")
    parser.add_argument("--device", help="cpu or cuda; without it, cuda where there is one")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer folder, where MODEL has none")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser
