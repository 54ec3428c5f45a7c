"""Checks whether prepared data is what its meta.json says, from the folder alone.

All of it is read: sizes and sha256 have to be right, every id below the vocabulary's size, and the
decoded text made of whole characters. If the documents are in the order of the inputs, their text
has to have the inputs' sha256. That proves that nothing was lost, changed or moved.

It does not prove that the tokenizer chose these ids: "t" + "he" decodes to "the" as well. So
tiktoken, the reference, encodes samples again, and the ids are compared. A sample is a document, or
lies between two places where text may be cut without changing its ids (see encoder.py). Alone it
has the same ids, so a difference is always an error.
"""

import codecs
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prepare.data import find_tokenizer, open_split, read_meta
from prepare.ranks import KNOWN
from prepare.tokenizer import UNKNOWN, Tokenizer, endless_blanks
from prepare.tokens import META, DataError, Input, Meta, Split, blocks

SAMPLES = 64  # of each split
SAMPLE_TOKENS = 1 << 13  # 35 kB of English
_LONGEST_SAMPLE = 1 << 20  # tokens in which two cuts have to be found: 2 MB of Chinese


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    good: bool | None
    """Whether all is well; None if it could not be checked."""
    text: str


def verify(folder: Path, advance: Callable[[int], None] = lambda _: None) -> Iterator[Finding]:
    """Checks a folder, whoever made it. `advance` is called with the bytes of token files that were read."""
    try:
        meta = read_meta(folder)
        ours = (folder / META).exists()
        tokenizer = find_tokenizer(folder)
    except DataError as error:
        yield Finding(False, str(error))
        return
    yield _vocabulary(meta, tokenizer)
    text = None
    if tokenizer and tokenizer.vocab_size == meta.vocab_size:
        text = Vocabulary(tokenizer, meta.eot_id, meta.tokenizer.specials.get(UNKNOWN))
    comparison = _Inputs(meta.inputs) if text and _in_order_of_inputs(meta) else None
    for name, split in meta.splits.items():
        try:
            ids = open_split(folder, name)
        except DataError as error:
            yield Finding(False, str(error))
            comparison = None
            continue
        reading = _Reading(meta.vocab_size, text, comparison, torn_edges=not ours)
        for block in blocks(ids, size=1 << 18):
            reading.add(block)
            advance(block.nbytes)
        yield from reading.findings(split, ours, repaired=any(source.repaired for source in meta.inputs))
        if reading.broken or reading.unknown:
            comparison = None
        if text and not reading.broken:
            yield encoded_again(ids, split.file, text, edges_are_borders=ours)
    if comparison:
        yield comparison.finding()
    elif ours and not _in_order_of_inputs(meta):
        yield Finding(
            None, "the text was not compared with the inputs: it was repaired, or does not lie in their order"
        )


class Vocabulary:
    """For each id, what is needed to treat ids as if they were text."""

    def __init__(self, tokenizer: Tokenizer, eot_id: int | None, unknown_id: int | None = None) -> None:
        """`unknown_id`: the id of text that the tokenizer could not encode (<unk>)."""
        self.tokenizer = tokenizer
        self.eot_id = eot_id
        self.unknown_id = unknown_id
        self.texts = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        """The bytes of each id."""
        self._continues = np.array([0x80 <= text[0] < 0xC0 if text else False for text in self.texts])
        self._blank_first = np.array([text[:1] == b" " for text in self.texts])
        self._word_last = np.array([b"!" <= text[-1:] <= b"~" for text in self.texts])

    def without_eot(self, ids: np.ndarray) -> np.ndarray:
        return ids if self.eot_id is None else ids[ids != self.eot_id]

    def torn(self, ids: np.ndarray) -> np.ndarray:
        """Indices in `ids`, shape (n,), of tokens after an end of text that begin within a character."""
        return 1 + np.flatnonzero((ids[:-1] == self.eot_id) & self._continues[ids[1:]])

    def borders(self, ids: np.ndarray) -> np.ndarray:
        """Indices from 1 to n - 1 in `ids`, shape (n,), at which text may be cut without changing its ids; in order."""
        if self.tokenizer.cuts_anywhere:
            return 1 + np.flatnonzero(~self._continues[ids[1:]])
        cuts = self._word_last[ids[:-1]] & self._blank_first[ids[1:]]
        if self.eot_id is not None:
            cuts |= (ids[:-1] == self.eot_id) | (ids[1:] == self.eot_id)
        return 1 + np.flatnonzero(cuts)


def encoded_again(ids: np.memmap, file: str, text: Vocabulary, *, edges_are_borders: bool) -> Finding:
    """Compares samples of `ids`, shape (n,), with what the tokenizer makes of their text.

    A short file is one sample. `edges_are_borders`: whether the text begins with the first id and
    ends with the last.
    """
    count = SAMPLES if len(ids) > SAMPLES * SAMPLE_TOKENS else 1
    length = SAMPLE_TOKENS if count > 1 else len(ids)
    compared, unchecked = 0, 0
    for start in np.linspace(0, len(ids) - length, count).astype(int).tolist():
        sample = _between_borders(ids, start, length, text, edges_are_borders)
        if sample is None:
            unchecked += 1
            continue
        start, stored = sample
        for part, at in _pieces(stored, text):
            try:
                plain = text.tokenizer.decode_bytes(part).decode("utf-8")
            except UnicodeDecodeError:
                return Finding(False, f"{file}: tokens {start + at:,} and on begin or end within a character")
            if endless_blanks(plain):  # tiktoken could not split it
                continue
            again = text.tokenizer.encode(plain)
            if not np.array_equal(again, part):
                first = next((i for i, (a, b) in enumerate(zip(part, again, strict=False)) if a != b), 0)
                return Finding(
                    False,
                    f"{file}: token {start + at + first:,} is {part[first]} {_shown(text, part[first])}, where the "
                    f"{text.tokenizer.name} tokenizer has {again[first]} {_shown(text, again[first])}: "
                    "prepare the data again",
                )
            compared += len(part)
    if not compared:
        return Finding(None, f"{file}: nothing was encoded again: no place where the text may be cut was found")
    where = (
        f"{count - unchecked} samples" if count > 1 else "all" if edges_are_borders else "all but those at the edges"
    )
    return Finding(True, f"{file}: {compared:,} tokens ({where}) are what the reference makes of their text")


def _between_borders(
    ids: np.memmap, start: int, length: int, text: Vocabulary, edges_are_borders: bool
) -> tuple[int, np.ndarray] | None:
    """About `length` ids from `start` on that begin and end at a border, and the index of the first one."""
    while True:
        stop = min(start + length, len(ids))
        sample = np.array(ids[start:stop], dtype=np.int64)
        borders = text.borders(sample)
        first = 0 if edges_are_borders and start == 0 else borders.min(initial=length)
        last = len(sample) if edges_are_borders and stop == len(ids) else borders.max(initial=0)
        if first < last:
            return start + int(first), sample[first:last]
        if stop == len(ids) or length >= _LONGEST_SAMPLE:
            return None
        length *= 4


def _pieces(ids: np.ndarray, text: Vocabulary) -> Iterator[tuple[np.ndarray, int]]:
    """Splits `ids`, which begin and end at a border, into parts that can be encoded by themselves.

    Yields each part, shape (k,) with k > 0, with its index in `ids`.
    """
    if text.unknown_id is not None and (ids == text.unknown_id).any():
        cuts = text.borders(ids)
    else:
        ends = np.flatnonzero(ids == text.eot_id) if text.eot_id is not None else np.empty(0, dtype=np.int64)
        cuts = np.sort(np.concatenate([ends, ends + 1]))
    for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(ids)], strict=True):
        piece = ids[start:stop]
        if start < stop and not ((piece == text.eot_id) | (piece == text.unknown_id)).any():
            yield piece, start


def _shown(text: Vocabulary, i: int) -> str:
    return repr(text.texts[i].decode("utf-8", errors="replace"))


def _vocabulary(meta: Meta, tokenizer: Tokenizer | None) -> Finding:
    name, size = meta.tokenizer.name, meta.vocab_size
    if meta.dtype not in ("uint16", "uint32") or size > 1 << (16 if meta.dtype == "uint16" else 32):
        return Finding(False, f"a vocabulary of {size:,} does not fit the ids, which are {meta.dtype}")
    if tokenizer is None:
        return Finding(None, f"the {name} tokenizer is not in the folder: the ids cannot be decoded")
    if tokenizer.vocab_size != size:
        return Finding(False, f"the {name} tokenizer has {tokenizer.vocab_size:,} ids, {META} says {size:,}")
    if tokenizer.eot_id != meta.eot_id:
        return Finding(False, f"the {name} tokenizer ends text with {tokenizer.eot_id}, {META} says {meta.eot_id}")
    if name in KNOWN and meta.tokenizer.sha256 not in (None, KNOWN[name].sha256):
        return Finding(None, f"{meta.tokenizer.file} is called {name}, and is not what the world calls so")
    return Finding(True, f"the {name} tokenizer is the one recorded, with {size:,} ids that fit {meta.dtype}")


class _Reading:
    """Checks the ids of one split, from first to last, and the text that they stand for."""

    def __init__(
        self, vocab_size: int, text: Vocabulary | None, comparison: "_Inputs | None", *, torn_edges: bool
    ) -> None:
        self.broken: str | None = None
        """The first reason why the ids are not text."""
        self.unknown = 0
        """How many ids are <unk>, so that their text is lost."""
        self._vocab_size = vocab_size
        self._text = text
        self._comparison = comparison
        self._torn_edges = torn_edges
        self._sha256 = hashlib.sha256()
        self._tokens = self._bytes = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._last = np.empty(0, dtype=np.int64)

    def add(self, ids: np.ndarray) -> None:
        """Checks the next ids, shape (n,)."""
        self._sha256.update(ids.data)
        unknown = np.flatnonzero(ids >= self._vocab_size)
        if unknown.size and not self.broken:
            what = f"token {self._tokens + int(unknown[0]):,} is {ids[unknown[0]]}"
            self.broken = f"{what}, and ids go from 0 to {self._vocab_size - 1}"
        if self._text and not self.broken:
            self._decode(np.concatenate([self._last, ids]), self._text)
            self._last = ids[-1:].astype(np.int64)
        self._tokens += len(ids)

    def findings(self, split: Split, ours: bool, repaired: bool) -> Iterator[Finding]:
        """What was found, compared with `split`. `repaired`: its bytes were counted before bad text was replaced."""
        if ours:
            same = self._sha256.hexdigest() == split.sha256
            verdict = (
                "has the size and the sha256 recorded" if same else "was changed: its sha256 is not the one recorded"
            )
            yield Finding(same, f"{split.file}: {verdict}" + ("" if same else "; prepare the data again"))
        else:
            yield Finding(None, f"{split.file}: no sha256 was recorded, a changed id shows only if it breaks the text")
        if self._text and not self.broken and not self._torn_edges:
            try:
                self._decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                self.broken = "the text ends within a character"
        if self.broken:
            yield Finding(False, f"{split.file}: {self.broken}; prepare the data again")
            return
        yield Finding(True, f"{split.file}: each of its {self._tokens:,} ids is below {self._vocab_size:,}")
        if self.unknown:
            lost = f"{self.unknown:,} words are {UNKNOWN}"
            yield Finding(None, f"{split.file}: {lost}, so its text cannot be compared with the inputs'")
        elif self._text and not repaired and split.bytes_in not in (0, self._bytes):
            said = f"{META} says {split.bytes_in:,}"
            yield Finding(False, f"{split.file}: the text has {self._bytes:,} bytes, {said}: prepare the data again")
        elif self._text:
            yield Finding(True, f"{split.file}: decodes to {self._bytes:,} bytes, all of them whole characters")

    def _decode(self, ids: np.ndarray, text: Vocabulary) -> None:
        """Decodes `ids`. The first one is the last id of the block before."""
        seen = len(self._last)
        if (torn := text.torn(ids)).size:
            self.broken = f"the document at token {self._tokens - seen + int(torn[0]):,} begins within a character"
            return
        if text.unknown_id is not None:
            self.unknown += int(np.count_nonzero(ids[seen:] == text.unknown_id))
        data = text.tokenizer.decode_bytes(text.without_eot(ids[seen:]))
        if not self._tokens and self._torn_edges:
            data = data[:3].lstrip(bytes(range(0x80, 0xC0))) + data[3:]
        self._bytes += len(data)
        try:
            self._decoder.decode(data)
        except UnicodeDecodeError as error:
            self.broken = f"within {len(ids):,} tokens from {self._tokens:,} on, the text is not UTF-8 ({error.reason})"
        if self._comparison:
            self._comparison.add(data)


def _in_order_of_inputs(meta: Meta) -> bool:
    """Whether the text of train followed by that of val is the text of the inputs, unchanged and in their order."""
    text = sum(split.bytes_in for split in meta.splits.values())
    repaired = any(source.repaired for source in meta.inputs)
    return meta.split.method == "tail" and not repaired and text == sum(source.bytes for source in meta.inputs)


class _Inputs:
    """Cuts decoded text into the inputs that it came from, and compares the sha256 of each."""

    def __init__(self, inputs: Sequence[Input]) -> None:
        self._inputs = [source for source in inputs if source.bytes]
        self._sha256 = hashlib.sha256()
        self._done = 0
        self._left = self._inputs[0].bytes
        self._differing: list[str] = []

    def add(self, data: bytes) -> None:
        """Takes the next bytes of text."""
        rest = memoryview(data)
        while rest and self._done < len(self._inputs):
            self._sha256.update(rest[: self._left])
            self._left, rest = self._left - len(rest[: self._left]), rest[self._left :]
            if not self._left:
                source = self._inputs[self._done]
                if self._sha256.hexdigest() != source.sha256:
                    self._differing.append(source.name)
                self._sha256 = hashlib.sha256()
                self._done += 1
                self._left = self._inputs[self._done].bytes if self._done < len(self._inputs) else 0

    def finding(self) -> Finding:
        if self._differing:
            return Finding(False, f"the text is not that of {', '.join(self._differing[:3])}: prepare the data again")
        if self._done < len(self._inputs):
            return Finding(False, f"the text of {self._inputs[self._done].name} is not whole: prepare the data again")
        return Finding(True, "the text is that of the inputs, byte for byte: the sha256 of each is the one recorded")
