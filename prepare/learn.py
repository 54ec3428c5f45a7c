"""Vocabularies learned from the text itself: its characters, its words, or byte pairs."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from prepare import tokenizer
from prepare.tokenizer import Characters, Tokenizer, Words
from prepare.tokens import DataError

MAX_WORDS = 2_000_000
"""Different ones that we are ready to count: about 300 MB."""


def characters(texts: Iterator[str]) -> Tokenizer:
    """All characters of the text."""
    seen = np.zeros(0x110000, dtype=bool)
    for text in texts:
        seen[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")] = True
    return Characters(map(chr, np.flatnonzero(seen)))


def words(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """The words of the text, the most frequent first; so many that `vocab_size` holds them (0: all).

    Raises DataError where there are more than MAX_WORDS.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(Words.split(text))
        if len(counts) > MAX_WORDS:
            raise DataError(f"the text has more than {MAX_WORDS:,} different words: use --tokenizer bpe or gpt2")
    if vocab_size and vocab_size < 4:
        raise DataError(f"--vocab-size {vocab_size} is too small: two words and two special tokens make 4")
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    return Words(ordered[: vocab_size - 2] if vocab_size else ordered)


def byte_pairs(texts: Iterator[str], size: int, vocab_size: int, sample_size: int) -> Tokenizer:
    """Merges learned from about `sample_size` bytes, taken evenly from all of the text, which has about `size`."""
    every = max(1, size // sample_size)

    def sampled() -> Iterator[str]:
        taken = 0
        for number, text in enumerate(texts):
            if number % every == 0:
                yield text
                taken += len(text)
                if taken >= sample_size:  # of packed files, nobody knows the size
                    return

    return tokenizer.train_bpe(sampled(), vocab_size)
