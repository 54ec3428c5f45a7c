"""Text to ids and back: the encodings of tiktoken, a BPE trained on the corpus, words, characters, bytes.

The one door to tiktoken and rustbpe. `load(folder)` gives back, without a network, the tokenizer that a prepared folder
was made with.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken
from numpy.typing import ArrayLike

from prepare import ranks
from prepare.ranks import END_OF_TEXT, KNOWN, PATTERNS
from prepare.tokens import META, DataError, TokenizerSection, read_meta, write_file

FOLDER = "tokenizer"
UNKNOWN = "<unk>"

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


class Words(Tokenizer):
    """Words of the corpus, a space before one being part of it; what is no word goes character by character.

    Id 0 is <unk>: what the vocabulary lacks becomes it, and comes back as "<unk>". All other text comes back as it was.
    """

    name = "word"
    cuts_anywhere = False
    _file = f"{FOLDER}/words.json"
    # Like GPT-2's pattern it stops at U+0020, so that text may be cut at the same places. `_` is part of a word.
    _word = re.compile(r" ?\w+| ?[^\w\s]|\s")

    def __init__(self, words: Iterable[str]) -> None:
        """`words` in the order of their ids, which begin at 1."""
        self._words = [UNKNOWN, *words, END_OF_TEXT]
        self.vocab_size = len(self._words)
        self.eot_id = self.vocab_size - 1
        self._ids = {word: number for number, word in enumerate(self._words) if number not in (0, self.eot_id)}

    @classmethod
    def split(cls, text: str) -> list[str]:
        """The words of `text`, which together are the text."""
        return cls._word.findall(text)

    def _encode(self, text: str) -> np.ndarray:
        find = self._ids.get
        return np.array([find(word, 0) for word in self._word.findall(text)], dtype=np.uint32)

    def _decode_bytes(self, ids: np.ndarray) -> bytes:
        return "".join(self._words[i] for i in ids).encode()

    def save(self, folder: Path) -> TokenizerSection:
        (folder / FOLDER).mkdir(exist_ok=True)
        data = json.dumps(self._words[1:-1], ensure_ascii=False).encode()
        specials = {UNKNOWN: 0, END_OF_TEXT: self.vocab_size - 1}
        return TokenizerSection("word", self.name, None, self._file, write_file(folder / self._file, data), specials)


class BytePairs(Tokenizer):
    """Byte pair encoding by tiktoken: a known vocabulary, one of the user's own, or one of our own training."""

    cuts_anywhere = False
    file = f"{FOLDER}/ranks.tiktoken"

    def __init__(
        self, name: str, data: bytes, pattern: str = PATTERNS["gpt2"], specials: Mapping[str, int] | None = None
    ) -> None:
        """`data` is the text of a .tiktoken file. Without `specials`, <|endoftext|> comes after all its ranks."""
        self.name = name
        self.data = data
        self.pattern = pattern
        self.merges = ranks.parse(data, name)
        self._specials = dict(specials or {END_OF_TEXT: max(self.merges.values()) + 1})
        self.eot_id = self._specials[END_OF_TEXT]
        # Between the ranks and the special tokens of cl100k_base and o200k_base are ids that nothing has.
        self.vocab_size = max(*self.merges.values(), *self._specials.values()) + 1
        self._holes = self.vocab_size > len(self.merges) + len(self._specials)
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=self.merges, special_tokens=self._specials
        )

    def _encode(self, text: str) -> np.ndarray:
        if endless_blanks(text):
            raise DataError(
                f"{_BLANK_BLOCK:,} or more blanks or newlines in a row are too many for tiktoken: take them out, "
                "or use the fast engine, or --tokenizer char or byte"
            )
        # Not encode_to_numpy, though 1.1 times as fast: before tiktoken 0.11 it took special tokens from the text.
        return np.array(self._encoding.encode_ordinary(text), dtype=np.uint32)

    def _decode_bytes(self, ids: np.ndarray) -> bytes:
        if not self._holes:
            return self._encoding.decode_bytes(ids.tolist())
        tokens = []
        for token in ids.tolist():
            try:
                tokens.append(self._encoding.decode_single_token_bytes(token))
            except KeyError:  # only a model that has not learned makes one up
                tokens.append("\ufffd".encode())
        return b"".join(tokens)

    def save(self, folder: Path) -> TokenizerSection:
        (folder / FOLDER).mkdir(exist_ok=True)
        sha256 = write_file(folder / self.file, self.data)
        return TokenizerSection("bpe", self.name, self.pattern, self.file, sha256, self._specials)


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a prepared folder, ours or another tool's. Raises DataError where its file is missing or changed."""
    if not (folder / META).exists():
        from prepare.interop import load_tokenizer  # which is made of this module's types

        if tokenizer := load_tokenizer(folder):
            return tokenizer
        read_meta(folder)  # says so where nothing was prepared at all
        raise DataError(f"{folder} does not say what tokenizer its ids are of: name a folder that prepare made")
    return from_section(read_meta(folder).tokenizer, folder)


def from_section(section: TokenizerSection, folder: Path) -> Tokenizer:
    """The tokenizer that `section` describes, its file below `folder`. Raises DataError as `load` does."""
    if section.kind == "byte":
        return Bytes()
    if section.kind not in ("bpe", "char", "word") or section.file is None:
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
    if section.kind == "word":
        return Words(json.loads(data))
    return BytePairs(section.name, data, section.pattern or PATTERNS["gpt2"], section.specials)


def known(name: str, file: Path | None = None) -> BytePairs:
    """gpt2 (50,257 ids), r50k_base (the same), cl100k_base (100,277) or o200k_base (200,019); `file`: its ranks."""
    return BytePairs(name, ranks.find(name, file), KNOWN[name].pattern, KNOWN[name].specials)


def gpt2(file: Path | None = None) -> BytePairs:
    """GPT-2's tokenizer, found without a network."""
    return known("gpt2", file)


def from_file(file: Path, pattern: str) -> BytePairs:
    """A .tiktoken file of the user's own, with the pattern of that name (a key of PATTERNS)."""
    return BytePairs(file.name.removesuffix(".tiktoken"), ranks.read(file), PATTERNS[pattern])


def train_bpe(chunks: Iterable[str], vocab_size: int) -> BytePairs:
    """A BPE of at most `vocab_size` ids (256 bytes, the merges, one special) learned from `chunks` of text.

    It has fewer where the text has no more pairs to merge. Raises DataError where `vocab_size` leaves no room for the
    bytes.
    """
    if vocab_size < 257:
        raise DataError(f"--vocab-size {vocab_size} is too small: 256 bytes and {END_OF_TEXT} make 257")
    trainer = rustbpe.Tokenizer()
    # A run of blanks without end stops the trainer's matcher, and has nothing to teach.
    learnable = (chunk for chunk in chunks if not endless_blanks(chunk))
    # buffer_size counts chunks, of 0.5 MiB here; its default of 8192 would hold gigabytes.
    trainer.train_from_iterator(learnable, vocab_size - 1, buffer_size=16, pattern=PATTERNS["gpt2"])
    return BytePairs("bpe", ranks.dump({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}))


def endless_blanks(text: str) -> bool:
    """Whether `text` has more blanks in a row than tiktoken can bear."""
    return any(
        text[start : start + _BLANK_BLOCK].isspace() for start in range(0, len(text) - _BLANK_BLOCK + 1, _BLANK_BLOCK)
    )
