"""Text to ids and back: the encodings of tiktoken, a BPE trained on the corpus, words, characters, bytes.

Each kind is a class that knows its name and how it is learned from text, saved and loaded. To add
one: a class, and its line in KINDS. Only this module imports tiktoken and rustbpe. data.py loads
the tokenizer of a prepared folder, without a network.
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

# On a million spaces in a row, tiktoken's pattern matcher overflows its stack, prints a page and raises a BaseException;
# 600,000 are fine. Any run of twice this length contains an aligned block of this length.
_BLANK_BLOCK = 300_000

MAX_WORDS = 2_000_000
"""Most different words that are counted; they take about 300 MB."""


@dataclass(frozen=True)
class Learning:
    """Settings of how a vocabulary is learned from text."""

    size: int
    """About how many bytes the text has."""
    vocab_size: int = 0
    """Number of ids, special tokens included. 0: as many as the text has."""
    sample_size: int = 100_000_000
    """Bytes that a BPE learns from, taken evenly from the whole text."""


class Tokenizer(ABC):
    """Text to ids and back. `encode` gives uint32 ids of shape (n,), all below `vocab_size`."""

    kind: ClassVar[str]
    """Its name in meta.json, by which the class is found again."""
    learned: ClassVar[bool] = True
    """Whether the vocabulary is learned from the text."""
    sized: ClassVar[bool] = False
    """Whether the size of the vocabulary can be chosen."""
    name: str
    vocab_size: int
    """Number of ids, special tokens included."""
    eot_id: int | None = None
    """The id between documents; None if there is none."""
    specials: Mapping[str, int] = MappingProxyType({})
    """Special tokens and their ids. Text never becomes one of them; only `prepare` puts them between documents."""
    cuts_anywhere: bool
    """Whether text may be cut between any two characters without changing its ids."""

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`. What looks like a special token in it is ordinary text.

        Raises DataError for text that cannot be encoded: a character that a char tokenizer does not
        know, a lone surrogate (of which tiktoken would make U+FFFD), a huge run of spaces.
        """
        try:
            return self._encode(text)
        except UnicodeEncodeError as error:
            raise DataError(
                f"{text[error.start]!r} at position {error.start} is half a character (a lone surrogate)"
            ) from error

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        """The UTF-8 of `ids`, shape (n,). May begin and end within a character. Raises DataError for an unknown id."""
        array = np.asarray(ids, dtype=np.int64)
        unknown = array[(array < 0) | (array >= self.vocab_size)]
        if unknown.size:
            raise DataError(f"token id {unknown[0]} is not in the vocabulary: ids go from 0 to {self.vocab_size - 1}")
        return self._decode_bytes(array)

    def decode(self, ids: ArrayLike) -> str:
        """The text of `ids`. Bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @classmethod
    @abstractmethod
    def learn(cls, texts: Iterator[str], wanted: Learning) -> Self:
        """Learns a tokenizer from the pieces of a text. Raises DataError if `wanted` is not possible."""

    @classmethod
    @abstractmethod
    def load(cls, section: TokenizerSection, data: bytes) -> Self:
        """Loads the tokenizer that `save` described. `data`: content of the file that it wrote, b"" if it wrote none."""

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray: ...

    @abstractmethod
    def _decode_bytes(self, ids: np.ndarray) -> bytes: ...

    @abstractmethod
    def save(self, folder: Path) -> TokenizerSection:
        """Writes what decoding needs into `folder`/tokenizer/. Returns its section of meta.json."""


class Bytes(Tokenizer):
    """Each byte of the UTF-8 is an id, from 0 to 255."""

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
    """Each different character of the corpus is an id, in sorted order (as in nanoGPT's shakespeare_char and DLRover)."""

    kind = name = "char"
    cuts_anywhere = True
    _file = f"{FOLDER}/characters.json"

    def __init__(self, characters: Iterable[str]) -> None:
        self._characters = sorted(characters)
        self.vocab_size = len(self._characters)
        # A table of all of Unicode (4 MB) is 7 times as fast as looking up each character in a dict.
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
    """Each word of the corpus is an id, together with the space before it. All else is encoded character by character.

    Id 0 is <unk>, for what the vocabulary lacks; it decodes to "<unk>". All other text decodes to
    what it was.
    """

    kind = name = "word"
    sized = True
    cuts_anywhere = False
    _file = f"{FOLDER}/words.json"
    # Like GPT-2's pattern, it ends a word at a space, so that text may be cut at the same places. `_` belongs to words.
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
        """Learns the most frequent words, as many as the vocabulary has ids. Counts at most MAX_WORDS different ones."""
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
        """Splits `text` into words and single characters. Joined they are `text` again."""
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
    """Byte pair encoding by tiktoken, with a well-known vocabulary, the user's own, or one learned from the text."""

    kind = "bpe"
    sized = True
    cuts_anywhere = False
    file = f"{FOLDER}/ranks.tiktoken"

    def __init__(
        self, name: str, data: bytes, pattern: str = PATTERNS["gpt2"], specials: Mapping[str, int] | None = None
    ) -> None:
        """`data`: content of a .tiktoken file. `specials` None: <|endoftext|> gets the id after all ranks."""
        self.name = name
        self.data = data
        self.pattern = pattern
        self.merges = ranks.parse(data, name)
        self.specials = dict(specials or {END_OF_TEXT: max(self.merges.values()) + 1})
        self.eot_id = self.specials[END_OF_TEXT]
        # In cl100k_base and o200k_base, some ids between the ranks and the special tokens are unused.
        self.vocab_size = max(*self.merges.values(), *self.specials.values()) + 1
        self._holes = self.vocab_size > len(self.merges) + len(self.specials)
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=self.merges, special_tokens=dict(self.specials)
        )

    @classmethod
    def learn(cls, texts: Iterator[str], wanted: Learning) -> Self:
        """Learns merges from about `sample_size` bytes, taken evenly from the whole text.

        The tokenizer has fewer ids than wanted if the text has no more pairs to merge.
        """
        if wanted.vocab_size < 257:
            raise DataError(f"--vocab-size {wanted.vocab_size} is too small: 256 bytes and {END_OF_TEXT} make 257")
        every = max(1, wanted.size // wanted.sample_size)

        def sampled() -> Iterator[str]:
            taken = 0
            for number, text in enumerate(texts):
                # A huge run of spaces overflows the trainer's matcher, and there is nothing to learn from it.
                if number % every == 0 and not endless_blanks(text):
                    yield text
                    taken += len(text)
                    if taken >= wanted.sample_size:  # the size of packed files is not known
                        return

        trainer = rustbpe.Tokenizer()
        # buffer_size counts texts, here of 0.5 MiB; its default of 8192 would take gigabytes.
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
        # encode_to_numpy is 1.1 times as fast, but before tiktoken 0.11 it made special tokens of text.
        return np.array(self._encoding.encode_ordinary(text), dtype=np.uint32)

    def _decode_bytes(self, ids: np.ndarray) -> bytes:
        if not self._holes:
            return self._encoding.decode_bytes(ids.tolist())
        tokens = []
        for token in ids.tolist():
            try:
                tokens.append(self._encoding.decode_single_token_bytes(token))
            except KeyError:  # an id between the ranks and the special tokens, which only an untrained model draws
                tokens.append("\ufffd".encode())
        return b"".join(tokens)

    def save(self, folder: Path) -> TokenizerSection:
        (folder / FOLDER).mkdir(exist_ok=True)
        sha256 = write_file(folder / self.file, self.data)
        return TokenizerSection(self.kind, self.name, self.pattern, self.file, sha256, dict(self.specials))


KINDS: dict[str, type[Tokenizer]] = {kind.kind: kind for kind in (BytePairs, Characters, Words, Bytes)}
CHOICES = (*KNOWN, "tiktoken", *KINDS)
"""What a user can choose: a well-known vocabulary, a .tiktoken file of their own, or a kind learned from the text."""


def from_section(section: TokenizerSection, folder: Path) -> Tokenizer:
    """The tokenizer that `section` describes, from its file below `folder`. Raises DataError if that is missing or changed."""
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
    """A well-known vocabulary: gpt2 or r50k_base (both 50,257 ids), cl100k_base (100,277) or o200k_base (200,019).

    `file`: its ranks file; None: found as ranks.find does.
    """
    return BytePairs(name, ranks.find(name, file), KNOWN[name].pattern, KNOWN[name].specials)


def gpt2(file: Path | None = None) -> BytePairs:
    """GPT-2's tokenizer, found without a network."""
    return known("gpt2", file)


def from_file(file: Path, pattern: str) -> BytePairs:
    """The tokenizer of a .tiktoken file of the user's own. `pattern`: a key of PATTERNS."""
    return BytePairs(file.name.removesuffix(".tiktoken"), ranks.read(file), PATTERNS[pattern])


def endless_blanks(text: str) -> bool:
    """Whether `text` has more spaces in a row than tiktoken can split."""
    return any(
        text[start : start + _BLANK_BLOCK].isspace() for start in range(0, len(text) - _BLANK_BLOCK + 1, _BLANK_BLOCK)
    )
