"""huggingface_tokenizer.py: the same ids for any text."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_zoo.nanogpt.huggingface_tokenizer import merges
from prepare.tokenizer import Bytes, Characters, Tokenizer, Words, gpt2
from prepare.tokens import DataError
from tests.conftest import trained_bpe
from tests.nanogpt.test_export import exported, transformers

CORPUS = "the theme of thee: aaaa aaa aa 12 345's  \n\n\tnaïve café, don't! 你好 <|endoftext|> <unk> "
TOKENIZERS: dict[str, Tokenizer] = {
    "gpt2": gpt2(),
    "bpe": trained_bpe([CORPUS * 20], 400),
    "char": Characters(CORPUS),
    "word": Words(sorted(set(Words.split(CORPUS)))),
    "byte": Bytes(),
}
# Text that finds the borders: parts of the corpus, blanks of all kinds, marks, and whatever else there is.
TEXTS = st.lists(
    st.sampled_from([CORPUS, "a", "aa", " ", "  ", "\n", "\r\n", "\x1c", "\u00a0", "\u3000", "e\u0301", "the", "<unk>"])
    | st.sampled_from(["<|endoftext|>", "'ſ", "'S", "don't", "١٢", "½", "_", "ß", "😀", "\ufffd"])
    | st.text(max_size=8),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module", params=TOKENIZERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    tokenizer = TOKENIZERS[request.param]
    folder = exported(tmp_path_factory.mktemp("export") / request.param, tokenizer)
    return tokenizer, transformers.AutoTokenizer.from_pretrained(folder)


@settings(max_examples=300)
@given(TEXTS)
def test_autotokenizer_gives_the_same_ids_for_any_text_and_the_text_back(
    pair: tuple[Tokenizer, Any], text: str
) -> None:
    ours, theirs = pair
    if isinstance(ours, Characters) and set(text) - set(CORPUS):
        with pytest.raises(DataError):
            ours.encode(text)
        with pytest.raises(Exception, match=r"UNK|unk"):
            theirs(text)
        return
    ids = ours.encode(text).tolist()
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == ours.decode(ids)


def test_the_exported_tokenizer_knows_the_end_of_text(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    assert theirs.eos_token_id == ours.eot_id


def test_every_pair_that_makes_a_token_is_told_and_not_only_the_one_that_training_met() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258}
    assert merges(ranks) == [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc"), (b"ab", b"c")]
