"""Text to ids and back: the encodings of tiktoken, a BPE trained on the corpus, words, characters, bytes.

Each kind of tokenizer owns its name, how it is learned from text, saved and loaded. To add one: a class, and its line in
KINDS. The one door to tiktoken and rustbpe. data.py gives back, without a network, the tokenizer of a prepared folder.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Self

import numpy as np
import rustbpe
import tiktoken
from numpy.typing import ArrayLike

from prepare import ranks
from prepare.ranks import END_OF_TEXT, KNOWN, PATTERNS
from prepare.tokens import DataError, TokenizerSection, write_file

FOLDER = "tokenizer"
UNKNOWN = "<unk>"

# tiktoken's pattern matcher overflows its stack on a million blanks in a row, prints a page and raises a BaseException;
# 600 thousand are fine. Any run of twice this length holds an aligned block of this length.
_BLANK_BLOCK = 300_000

MAX_WORDS = 2_000_000
"""Different ones that we are ready to count: about 300 MB."""


@dataclass(frozen=True)
class Learning:
    """What a vocabulary is learned from, beside the text."""

    size: int
    """Bytes that the text has, about."""
    vocab_size: int = 0
    """Ids wanted, special tokens included; 0: all there are."""
    sample_size: int = 100_000_000
    """Bytes that a BPE learns from, taken evenly from all of the text."""


class Tokenizer(ABC):
    """Text to ids and back. `encode` gives uint32 ids of shape (n,), all below `vocab_size`."""

    kind: ClassVar[str]
    """In meta.json; what `load` is chosen by."""
    learned: ClassVar[bool] = True
    """Whether the vocabulary comes from the text, by `learn`."""
    sized: ClassVar[bool] = False
    """Whether the size of the vocabulary can be chosen."""
    name: str
    vocab_size: int
    """Special tokens included."""
    eot_id: int | None = None
    """The token between documents; None where there is none."""
    specials: Mapping[str, int] = MappingProxyType({})
    """Special tokens and their ids. Never found in text, only put there."""
    cuts_anywhere: bool
    """Whether text may be cut between any two characters without changing its ids."""

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`. What looks like a special token in it is ordinary text.

        Raises DataError where the text cannot be expressed: a character that char does not know, a lone surrogate
        (tiktoken makes U+FFFD of that), blanks without end.
        """
        try:
            return self._encode(text)
        except UnicodeEncodeError as error:
            raise DataError(
                f"{text[error.start]!r} at position {error.start} is half a character (a lone surrogate)"
            ) from error

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        """The UTF-8 of `ids`, shape (n,); may begin and end within a character. Raises DataError at an unknown id."""
        array = np.asarray(ids, dtype=np.int64)
        unknown = array[(array < 0) | (array >= self.vocab_size)]
        if unknown.size:
            raise DataError(f"token id {unknown[0]} is not in the vocabulary: ids go from 0 to {self.vocab_size - 1}")
        return self._decode_bytes(array)

    def decode(self, ids: ArrayLike) -> str:
        """The text of `ids`; bytes that are not a character become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @classmethod
    @abstractmethod
    def learn(cls, texts: Iterator[str], wanted: Learning) -> Self:
        """The tokenizer of a text, which comes in pieces. Raises DataError where `wanted` cannot be had."""

    @classmethod
    @abstractmethod
    def load(cls, section: TokenizerSection, data: bytes) -> Self:
        """The tokenizer that `save` described; `data` is the file that it wrote, empty where it wrote none."""

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray: ...

    @abstractmethod
    def _decode_bytes(self, ids: np.ndarray) -> bytes: ...

    @abstractmethod
    def save(self, folder: Path) -> TokenizerSection:
        """Writes what decoding needs into `folder`/tokenizer/ and says what it wrote."""


class Bytes(Tokenizer):
    """The 256 bytes of UTF-8 are the ids."""

    kind = name = "byte"
    learned = False
    vocab_size = 256
    cuts_anywhere = True

    @classmethod
    def learn(cls, texts: Iterator[str], wanted: Learning) -> Self:  # noqa: ARG003 - there is nothing to learn
        return cls()

    @classmethod
    def load(cls, section: TokenizerSection, data: bytes) -> Self:  # noqa: ARG003 - there is nothing to load
        return cls()

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def _decode_bytes(self, ids: np.ndarray) -> bytes:
        return ids.astype(np.uint8).tobytes()

    def save(self, folder: Path) -> TokenizerSection:  # noqa: ARG002 - there is nothing to save
        return TokenizerSection(self.kind, self.name, pattern=None, file=None, sha256=None, specials={})


class Characters(Tokenizer):
    """The corpus's own code points in sorted order are the ids (as in nanoGPT's shakespeare_char and DLRover)."""

    kind = name = "char"
    cuts_anywhere = True
    _file = f"{FOLDER}/characters.json"

    def __init__(self, characters: Iterable[str]) -> None:
        self._characters = sorted(characters)
        self.vocab_size = len(self._characters)
        # A table over all of Unicode (4 MB) makes encoding one look-up: 7 times as fast as a dict a character.
        self._ids = np.full(0x110000, -1, dtype=np.int32)
        self._ids[[ord(character) for character in self._characters]] = np.arange(self.vocab_size)

    @classmethod
    def learn(cls, texts: Iterator[str], wanted: Learning) -> Self:  # noqa: ARG003 - all characters are taken
        seen = np.zeros(0x110000, dtype=bool)
        for text in texts:
            seen[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")] = True
        return cls(map(chr, np.flatnonzero(seen)))

    @classmethod
    def load(cls, section: TokenizerSection, data: bytes) -> Self:  # noqa: ARG003
        return cls(json.loads(data))

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
        return TokenizerSection(self.kind, self.name, pattern=None, file=self._file, sha256=sha256, specials={})


class Words(Tokenizer):
    """Words of the corpus, a space before one being part of it; anything else goes character by character.

    Id 0 is <unk>: what the vocabulary lacks becomes it, and comes back as "<unk>". All other text comes back as it was.
    """

    kind = name = "word"
    sized = True
    cuts_anywhere = False
    _file = f"{FOLDER}/words.json"
    # Like GPT-2's pattern it stops at U+0020, so that text may be cut at the same places. `_` is part of a word.
    _word = re.compile(r" ?\w+| ?[^\w\s]|\s")

    def __init__(self, words: Iterable[str]) -> None:
        """`words` in the order of their ids, which begin at 1."""
        self._words = [UNKNOWN, *words, END_OF_TEXT]
        self.vocab_size = len(self._words)
        self.eot_id = self.vocab_size - 1
        self.specials = {UNKNOWN: 0, END_OF_TEXT: self.eot_id}
        self._ids = {word: number for number, word in enumerate(self._words) if number not in (0, self.eot_id)}

    @classmethod
    def learn(cls, texts: Iterator[str], wanted: Learning) -> Self:
        """The words of the text, the most frequent first, as many as the vocabulary holds; no more than MAX_WORDS."""
        if 0 < wanted.vocab_size < 4:
            raise DataError(f"--vocab-size {wanted.vocab_size} is too small: two words and two special tokens make 4")
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(cls.split(text))
            if len(counts) > MAX_WORDS:
                raise DataError(f"the text has more than {MAX_WORDS:,} different words: use --tokenizer bpe or gpt2")
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ordered[: wanted.vocab_size - 2] if wanted.vocab_size else ordered)

    @classmethod
    def load(cls, section: TokenizerSection, data: bytes) -> Self:  # noqa: ARG003
        return cls(json.loads(data))

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
        sha256 = write_file(folder / self._file, data)
        return TokenizerSection(self.kind, self.name, None, self._file, sha256, dict(self.specials))


class BytePairs(Tokenizer):
    """Byte pair encoding by tiktoken: a known vocabulary, one of the user's own, or one of our own training."""

    kind = "bpe"
    sized = True
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
        self.specials = dict(specials or {END_OF_TEXT: max(self.merges.values()) + 1})
        self.eot_id = self.specials[END_OF_TEXT]
        # Between the ranks and the special tokens of cl100k_base and o200k_base are ids that nothing has.
        self.vocab_size = max(*self.merges.values(), *self.specials.values()) + 1
        self._holes = self.vocab_size > len(self.merges) + len(self.specials)
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=self.merges, special_tokens=dict(self.specials)
        )

    @classmethod
    def learn(cls, texts: Iterator[str], wanted: Learning) -> Self:
        """Merges learned from about `sample_size` bytes, taken evenly from all of the text.

        It has fewer ids than wanted where the text has no more pairs to merge.
        """
        if wanted.vocab_size < 257:
            raise DataError(f"--vocab-size {wanted.vocab_size} is too small: 256 bytes and {END_OF_TEXT} make 257")
        every = max(1, wanted.size // wanted.sample_size)

        def sampled() -> Iterator[str]:
            taken = 0
            for number, text in enumerate(texts):
                # A run of blanks without end stops the trainer's matcher, and has nothing to teach.
                if number % every == 0 and not endless_blanks(text):
                    yield text
                    taken += len(text)
                    if taken >= wanted.sample_size:  # the size of packed files is not known
                        return

        trainer = rustbpe.Tokenizer()
        # buffer_size counts chunks, of 0.5 MiB here; its default of 8192 would hold gigabytes.
        trainer.train_from_iterator(sampled(), wanted.vocab_size - 1, buffer_size=16, pattern=PATTERNS["gpt2"])
        return cls("bpe", ranks.dump({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}))

    @classmethod
    def load(cls, section: TokenizerSection, data: bytes) -> Self:
        return cls(section.name, data, section.pattern or PATTERNS["gpt2"], section.specials)

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
        return TokenizerSection(self.kind, self.name, self.pattern, self.file, sha256, dict(self.specials))


KINDS: dict[str, type[Tokenizer]] = {kind.kind: kind for kind in (BytePairs, Characters, Words, Bytes)}
CHOICES = (*KNOWN, "tiktoken", *KINDS)
"""What a user can ask for: a known vocabulary, a .tiktoken file of their own, or a kind, learned from the text."""


def from_section(section: TokenizerSection, folder: Path) -> Tokenizer:
    """The tokenizer that `section` describes, its file below `folder`. Raises DataError where that is missing or changed."""
    if section.kind not in KINDS:
        raise DataError(f"{folder} was made with tokenizer {section.kind!r}, which this version does not know")
    data = b""
    if section.file is not None:
        path = folder / section.file
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise DataError(f"{path} is missing although meta.json names it: prepare the data again") from error
        if hashlib.sha256(data).hexdigest() != section.sha256:
            raise DataError(
                f"{path} is not the file that the data was made with (sha256 differs): prepare the data again"
            )
    return KINDS[section.kind].load(section, data)


def known(name: str, file: Path | None = None) -> BytePairs:
    """gpt2 (50,257 ids), r50k_base (the same), cl100k_base (100,277) or o200k_base (200,019); `file`: its ranks."""
    return BytePairs(name, ranks.find(name, file), KNOWN[name].pattern, KNOWN[name].specials)


def gpt2(file: Path | None = None) -> BytePairs:
    """GPT-2's tokenizer, found without a network."""
    return known("gpt2", file)


def from_file(file: Path, pattern: str) -> BytePairs:
    """A .tiktoken file of the user's own, with the pattern of that name (a key of PATTERNS)."""
    return BytePairs(file.name.removesuffix(".tiktoken"), ranks.read(file), PATTERNS[pattern])


def endless_blanks(text: str) -> bool:
    """Whether `text` has more blanks in a row than tiktoken can bear."""
    return any(
        text[start : start + _BLANK_BLOCK].isspace() for start in range(0, len(text) - _BLANK_BLOCK + 1, _BLANK_BLOCK)
    )
