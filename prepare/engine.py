"""The fast engine: fastokens, which gives tiktoken's ids at 10 to 30 times its speed. Only this module imports it.

Its ids are compared with tiktoken's in every run (encoder.py). A difference stops the run.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from prepare.ranks import KNOWN, PATTERNS, printable_bytes
from prepare.tokenizer import BytePairs, Tokenizer
from prepare.tokens import DataError

# fastokens has its own code for patterns that are exactly these strings, and is slow for others. GPT-2's has its own type.
_KNOWN_BY_HEART = {
    PATTERNS["cl100k_base"]: (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    PATTERNS["o200k_base"]: PATTERNS["o200k_base"],
}

_TRIAL = (
    "It's <|endoftext|> I'LL say   so:\n\n  naïve 漢字 👍🏽, 1234567 — e\u0301\r\n\t x\u00a0\u3000y 'S  \n"
    " /a/b\n/c \x00 end.  "
)


class Engine(Protocol):
    """Encodes texts, each one by itself. The ids of a text are uint32 of shape (n,)."""

    name: str

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]: ...


class Plain:
    """The tokenizer itself, for all that the fast engine cannot do."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = "tiktoken" if isinstance(tokenizer, BytePairs) else "numpy"
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._tokenizer.encode(text) for text in texts]


class Fast:
    """fastokens, with the vocabulary of a BytePairs tokenizer."""

    name = "fastokens"

    def __init__(self, tokenizer: BytePairs, folder: Path) -> None:
        """`folder` holds the tokenizer's saved ranks. Raises Unfit if fastokens would not give the same ids."""
        try:
            import fastokens
        except ImportError as error:
            raise Unfit("fastokens is not installed (pip install fastokens)") from error
        # Its own threads would come on top of --workers, and each keeps a cache of some ten megabytes.
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
        if tokenizer.pattern == PATTERNS["gpt2"]:
            self._engine = fastokens.Tokenizer.from_json_str(_as_json(tokenizer.merges))
        elif tokenizer.pattern in _KNOWN_BY_HEART:
            # At the end of a text, tiktoken's form of cl100k_base's pattern takes "\n " as one piece; the older form, which
            # fastokens knows, takes it as two. That makes a difference only with other vocabularies than the real one.
            real = hashlib.sha256(tokenizer.data).hexdigest() == KNOWN["cl100k_base"].sha256
            if tokenizer.pattern == PATTERNS["cl100k_base"] and not real:
                raise Unfit("with this pattern it knows cl100k_base's own vocabulary only")
            path = folder / tokenizer.file
            self._engine = fastokens.Tokenizer.from_tiktoken(str(path), pattern=_KNOWN_BY_HEART[tokenizer.pattern])
        else:
            raise Unfit("it does not know this pattern")
        if not np.array_equal(self([_TRIAL])[0], tokenizer.encode(_TRIAL)):
            raise Unfit("it gives other ids with this vocabulary")

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        # Without split_special_tokens, the text "<|endoftext|>" would become the special token.
        ids, offsets = self._engine.encode_batch_flat(list(texts), split_special_tokens=True)
        borders = np.frombuffer(offsets, dtype="<u8")[1:-1]
        return np.split(np.frombuffer(ids, dtype="<u4"), borders.astype(np.int64)) if texts else []


class Unfit(Exception):
    """The fast engine cannot stand in for this tokenizer. The message says why."""


def choose(name: str, tokenizer: Tokenizer, folder: Path) -> Engine:
    """The engine for `tokenizer`, whose files are in `folder`. `name` is auto, fast or tiktoken.

    Raises DataError if the fast engine is asked for and cannot do this tokenizer.
    """
    if name == "tiktoken" or not isinstance(tokenizer, BytePairs):
        return Plain(tokenizer)
    try:
        return Fast(tokenizer, folder)
    except Unfit as error:
        if name == "fast":
            raise DataError(
                f"--engine fast cannot encode with {tokenizer.name}: {error}; use --engine tiktoken"
            ) from error
        return Plain(tokenizer)


def _as_json(ranks: dict[bytes, int]) -> str:
    """The vocabulary as a Hugging Face tokenizer.json that splits text as GPT-2 does."""
    letters = printable_bytes()
    spelled = {token: token.decode("latin-1").translate(letters) for token in ranks}
    model = {
        "type": "BPE",
        "vocab": {spelled[token]: rank for token, rank in ranks.items()},
        "merges": [[spelled[left], spelled[right]] for left, right in _merges(ranks)],
    }
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "decoder": split, "model": model})


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """For each token of two or more bytes, in order of rank, the two tokens that its last merge joins."""
    halves: dict[bytes, tuple[bytes, bytes]] = {}
    rank_of = ranks.get
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if rank_of(left, rank) < rank and rank_of(right, rank) < rank and _apart(left, right, rank, ranks, halves):
                halves[token] = left, right
                break
        else:
            raise Unfit(f"token {rank} of its vocabulary is not made of two others")
    return list(halves.values())


def _apart(
    left: bytes, right: bytes, rank: int, ranks: dict[bytes, int], halves: dict[bytes, tuple[bytes, bytes]]
) -> bool:
    """Whether merging the bytes of `left` + `right`, up to `rank`, ends with just these two tokens.

    Goes back through the merges at their border, the last one first. Each must have been done
    before any merge across the border.
    """
    while ranks.get(left + right, rank) >= rank:
        if left in halves and (right not in halves or ranks[left] > ranks[right]):
            rank, left = ranks[left], halves[left][1]
        elif right in halves:
            rank, right = ranks[right] + 1, halves[right][0]  # of two equal merges the left one is done first
        else:
            return True
    return False
