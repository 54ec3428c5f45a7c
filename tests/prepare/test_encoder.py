"""encoder.py: chunked encoding gives the ids of the whole text."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prepare import encoder
from prepare.tokenizer import BytePairs, Bytes, Characters, gpt2, train_bpe
from prepare.tokens import DataError

GPT2 = gpt2()
# Unlike GPT-2's, its tokens may hold several spaces.
TRAINED = train_bpe(["The ships' hulls,\n            the shops, the   chips.\n\n I'll say: it's 1600! "] * 3, 300)

# What the pattern treats in different ways, above all around blanks.
BLANKS = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x1c", "\x85"]
WORDS = ["a", "The", "'s", "'", "'ll", "'LL", "1", "2345", "½", "é", "e\u0301", "漢字", "_", "<|endoftext|>"]
SIGNS = [".", "!?", "-", "~", "👍🏽", "\x00"]
ADVERSARIAL = st.lists(st.sampled_from([*BLANKS, *WORDS, *SIGNS]), max_size=60).map("".join)


def pieces(text: str, size: int) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text), size))


@pytest.mark.parametrize("tokenizer", [GPT2, TRAINED], ids=["gpt2", "trained"])
@settings(max_examples=400, deadline=None)
@given(text=ADVERSARIAL | st.text(max_size=80), size=st.integers(1, 40))
@example(text="a " * 50, size=1)
@example(text="end.  Two\n three. \n  four", size=5)
@example(text="a. \u00a0 \u00a0", size=40)  # one token holds two of these blanks: no safe cut between them
@example(text="a" + " " * 12 + "b", size=6)  # nor within a run of them
@example(text="", size=1)
def test_chunked_ids_differ_from_the_ids_of_the_whole(tokenizer: BytePairs, text: str, size: int) -> None:
    ids = np.concatenate(list(encoder.encode(pieces(text, size), tokenizer)))
    np.testing.assert_array_equal(ids, tokenizer._encoding.encode_ordinary(text))


@settings(max_examples=200, deadline=None)
@given(text=ADVERSARIAL | st.text(max_size=80), size=st.integers(1, 40))
def test_chunks_lose_or_double_text(text: str, size: int) -> None:
    assert "".join(encoder.chunks(pieces(text, size))) == text


def test_plain_text_is_held_whole_instead_of_cut() -> None:
    text = "One word, then another. " * 4000
    lengths = [len(chunk) for chunk in encoder.chunks(pieces(text, 1000))]
    assert len(lengths) >= 90
    assert max(lengths) < 2000


def test_text_without_a_cut_grows_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "MAX_CHUNK", 5000)
    held = "漢字" * 2500
    assert "".join(encoder.chunks(pieces(held, 100))) == held
    with pytest.raises(DataError, match=r"5,100 characters without .*漢字.*--tokenizer char or byte"):
        list(encoder.chunks(pieces(held + held, 100)))


def test_char_and_byte_wait_for_a_cut_that_they_do_not_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "MAX_CHUNK", 50)
    text = "漢字" * 100
    for tokenizer in (Bytes(), Characters("漢字")):
        ids = np.concatenate(list(encoder.encode(pieces(text, 30), tokenizer)))
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
