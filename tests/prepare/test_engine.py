"""engine.py: the fast engine gives tiktoken's ids, or is not used."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prepare import engine
from prepare.engine import Fast, Plain, Unfit, choose
from prepare.ranks import PATTERNS
from prepare.tokenizer import BytePairs, Bytes, gpt2, known
from prepare.tokens import DataError
from tests.conftest import trained_bpe
from tests.prepare.equality import differences
from tests.prepare.test_encoder import ADVERSARIAL, ENCODINGS

GPT2 = gpt2()


@pytest.fixture(scope="module", params=list(ENCODINGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Fast, BytePairs]:
    tokenizer = ENCODINGS[request.param]
    if request.param == "cl100k_base":
        with pytest.raises(Unfit, match="knows cl100k_base's own vocabulary only"):
            Fast(tokenizer, tmp_path_factory.mktemp("unfit"))
        if not os.environ.get("TIKTOKEN_CACHE_DIR"):
            pytest.skip("the ranks of cl100k_base are not in TIKTOKEN_CACHE_DIR")
        tokenizer = known("cl100k_base")
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer.save(folder)
    return Fast(tokenizer, folder), tokenizer


@settings(max_examples=500)
@given(texts=st.lists(ADVERSARIAL | st.text(max_size=200), max_size=5))
def test_fast_ids_equal_tiktokens(pair: tuple[Fast, BytePairs], texts: list[str]) -> None:
    fast, reference = pair
    found = fast(texts)
    assert len(found) == len(texts)
    for ids, text in zip(found, texts, strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == reference._encoding.encode_ordinary(text)


@pytest.mark.parametrize("blank", [" ", "\n", "\t ", "\u3000"])
def test_long_runs_of_blanks_get_the_right_ids(pair: tuple[Fast, BytePairs], blank: str) -> None:
    fast, reference = pair
    text = "a" + blank * 100_000 + "b"
    assert fast([text])[0].tolist() == reference._encoding.encode_ordinary(text)
    million = "a" + blank * 1_000_000 + "b"
    assert reference.decode(fast([million])[0]) == million


@pytest.mark.parametrize("fast", ["fast", "tiktoken"])
def test_mixed_text_gets_tiktokens_ids(tmp_path: Path, fast: str) -> None:
    size, tokens, wrong = differences(tmp_path, 4, "gpt2", fast, workers=2)
    assert size > 3_900_000
    assert tokens > 1_000_000
    assert wrong == 0


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_mixed_text_gets_tiktokens_ids_in_larger_vocabularies(tmp_path: Path, name: str) -> None:
    try:
        if not os.environ.get("TIKTOKEN_CACHE_DIR"):
            raise DataError("no cache")
        known(name)
    except DataError:
        pytest.skip(f"the ranks of {name} are not in TIKTOKEN_CACHE_DIR")
    assert differences(tmp_path, 2, name, "fast", workers=1)[2] == 0


def test_the_engine_is_the_one_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GPT2.save(tmp_path)
    assert isinstance(choose("auto", GPT2, tmp_path), Fast)
    assert isinstance(choose("tiktoken", GPT2, tmp_path), Plain)
    assert isinstance(choose("auto", Bytes(), tmp_path), Plain)
    odd = BytePairs("odd", GPT2.data, PATTERNS["gpt2"] + "|x")
    assert isinstance(choose("auto", odd, tmp_path), Plain)
    with pytest.raises(DataError, match=r"--engine fast cannot encode with odd: it does not know this pattern; use"):
        choose("fast", odd, tmp_path)
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert isinstance(choose("auto", GPT2, tmp_path), Plain)
    with pytest.raises(DataError, match=r"fastokens is not installed"):
        choose("fast", GPT2, tmp_path)


def test_an_engine_with_other_ids_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GPT2.save(tmp_path)
    real = engine._merges
    monkeypatch.setattr(engine, "_merges", lambda ranks: real(ranks)[:-30_000])
    assert isinstance(choose("auto", GPT2, tmp_path), Plain)
    with pytest.raises(DataError, match=r"gives other ids with this vocabulary"):
        choose("fast", GPT2, tmp_path)


def last_two(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, ...]:
    """What merging by rank, step by step, makes of `token`'s bytes before it stops short of the token."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        best, at = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        if best >= ranks[token]:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)


@settings(max_examples=2000)
@given(letters=st.integers(1, 3), joins=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=10))
def test_halves_are_what_merging_leaves(letters: int, joins: list[tuple[int, int]]) -> None:
    tokens = [bytes([ord("a") + i]) for i in range(letters)]
    for left, right in joins:
        token = tokens[left % len(tokens)] + tokens[right % len(tokens)]
        if token not in tokens and len(token) < 14:
            tokens.append(token)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    expected = [last_two(token, ranks) for token in tokens[letters:]]
    if all(len(parts) == 2 for parts in expected):
        assert engine._merges(ranks) == expected
    else:
        with pytest.raises(Unfit, match="not made of two others"):
            engine._merges(ranks)


def test_halves_of_gpt2_are_what_merging_leaves() -> None:
    by_rank = sorted(GPT2.merges, key=lambda token: GPT2.merges[token])
    assert engine._merges(GPT2.merges) == [last_two(token, GPT2.merges) for token in by_rank if len(token) > 1]


def test_a_vocabulary_that_no_merging_makes_is_read_as_it_is(tmp_path: Path) -> None:
    """A token whose halves are missing can only be met as a whole word, which merging never finds."""
    lines = trained_bpe(["ab " * 9], 258).data + b"eHl6 257\n"  # xyz
    odd = BytePairs("odd", lines)
    odd.save(tmp_path)
    assert odd.encode("xyz").tolist() == [257]
    assert isinstance(choose("auto", odd, tmp_path), Plain)
