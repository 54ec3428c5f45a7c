"""vocabulary.py: a fingerprint is that of tokens and ids, wherever they come from."""

from pathlib import Path

import pytest

from model_zoo.nanogpt.vocabulary import vocabulary_fingerprint
from prepare.ranks import END_OF_TEXT
from prepare.tokenizer import BytePairs, Bytes, Characters, Tokenizer, Words, from_section
from tests.conftest import trained_bpe

TEXT = "the theme of thee, and of them\n" * 20
BPE = trained_bpe([TEXT], 280)


@pytest.mark.parametrize("tokenizer", [BPE, Characters(TEXT), Words(["of", " the"]), Bytes()], ids=lambda one: one.kind)
def test_a_tokenizer_that_was_saved_elsewhere_has_the_same_fingerprint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    saved = from_section(tokenizer.save(tmp_path), tmp_path)
    assert vocabulary_fingerprint(saved) == vocabulary_fingerprint(tokenizer)


def test_other_tokens_other_ids_and_other_special_tokens_are_other_vocabularies() -> None:
    others: list[Tokenizer] = [
        *(Characters("abc"), Characters("abd"), Bytes()),
        *(Words(["a", "b"]), Words(["b", "a"])),
        *(BPE, trained_bpe([TEXT], 265), BytePairs("bpe", BPE.data, specials={END_OF_TEXT: 300})),
    ]
    assert len({vocabulary_fingerprint(one) for one in others}) == len(others)
    assert vocabulary_fingerprint(BytePairs("another name", BPE.data)) == vocabulary_fingerprint(BPE)
