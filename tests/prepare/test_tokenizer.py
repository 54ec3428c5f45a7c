"""tokenizer.py: every tokenizer gives back its text, here and after a trip through a folder without a network."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prepare import ranks
from prepare.corpus import Piece
from prepare.data import load_tokenizer, open_split, read_meta
from prepare.encoder import Chunker
from prepare.prepare import main
from prepare.ranks import PATTERNS
from prepare.sources import sample_texts
from prepare.tokenizer import BytePairs, Bytes, Characters, Tokenizer, Words, gpt2
from prepare.tokens import DataError
from tests.conftest import trained_bpe

TEXT = "naïve café — 漢字 👍🏽\r\n\tdon't <|endoftext|> stop.  \n"
GPT2 = gpt2()
ALL: list[Tokenizer] = [
    GPT2,
    Bytes(),
    Characters(set(TEXT)),
    trained_bpe([TEXT * 5], 280),
    Words(sorted(set(Words.split(TEXT)))),
    BytePairs("cl100k_base", GPT2.data, PATTERNS["cl100k_base"]),
]
NAMES = [tokenizer.name for tokenizer in ALL]


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
def test_text_comes_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.uint32
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode_bytes(ids.tolist()) == TEXT.encode()
    assert b"".join(tokenizer.decode_bytes([token]) for token in ids) == TEXT.encode()
    assert tokenizer.decode([]) == ""


@settings(max_examples=200)
@given(text=st.text(max_size=100))
def test_any_unicode_text_comes_back(text: str) -> None:
    for tokenizer in (ALL[0], ALL[1], Characters(set(text)), ALL[3], Words(set(Words.split(text)))):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [ALL[0], *ALL[3:]], ids=lambda tokenizer: tokenizer.name)
def test_a_special_token_in_the_text_is_ordinary_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one <|endoftext|> two")
    assert tokenizer.eot_id == tokenizer.vocab_size - 1
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode_bytes([tokenizer.eot_id]) == b"<|endoftext|>"


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
@pytest.mark.parametrize("beyond", [-1, 0, 70_000])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, beyond: int) -> None:
    bad = -1 if beyond < 0 else tokenizer.vocab_size + beyond
    with pytest.raises(DataError, match=rf"token id {bad} is not in the vocabulary"):
        tokenizer.decode([0, bad])


FLAGS = {
    "gpt2": ["--tokenizer", "gpt2"],
    "byte": ["--tokenizer", "byte"],
    "char": ["--tokenizer", "char"],
    "word": ["--tokenizer", "word"],
    "bpe": ["--tokenizer", "bpe", "--vocab-size", "280"],
}


def prepared(folder: Path, name: str) -> Path:
    """A folder prepared from TEXT."""
    (folder / "text.txt").write_bytes((TEXT * 5).encode())
    assert main([str(folder / "text.txt"), *FLAGS[name]]) == 0
    return folder


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.usefixtures("no_network")
def test_a_prepared_folder_decodes_by_itself(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepared(tmp_path, name)
    monkeypatch.setattr(ranks, "find", None)  # loading must not look for ranks anywhere else
    loaded, meta = load_tokenizer(folder), read_meta(folder)
    assert (loaded.name, loaded.vocab_size, loaded.eot_id) == (name, meta.vocab_size, meta.eot_id)
    text = loaded.decode(open_split(folder, "train")) + loaded.decode(open_split(folder, "val"))
    assert text == TEXT * 5
    np.testing.assert_array_equal(loaded.encode((TEXT * 5)[: int(0.9 * len(TEXT * 5))]), open_split(folder, "train"))


@pytest.mark.parametrize("name", ["gpt2", "char", "word", "bpe"])
def test_a_damaged_or_missing_tokenizer_file_is_refused(name: str, tmp_path: Path) -> None:
    folder = prepared(tmp_path, name)
    file = folder / str(read_meta(folder).tokenizer.file)
    data = file.read_bytes()
    file.write_bytes(data.replace(b"a", b"b", 1))
    with pytest.raises(DataError, match=r"sha256 differs"):
        load_tokenizer(folder)
    file.unlink()
    with pytest.raises(DataError, match=r"is missing although"):
        load_tokenizer(folder)


def test_char_ids_are_those_of_dlrover() -> None:
    tokenizer = Characters(set("hello\n"))
    assert tokenizer.vocab_size == 5
    assert tokenizer.encode("hello\n").tolist() == [sorted(set("hello\n")).index(c) for c in "hello\n"]


def test_an_unknown_character_is_named() -> None:
    with pytest.raises(DataError, match=r"character '漢' \(U\+6F22\) is not among the 3 characters"):
        Characters("abc").encode("ab漢c")


@pytest.mark.parametrize("tokenizer", [ALL[1], ALL[2]], ids=["byte", "char"])
def test_a_lone_surrogate_is_an_error_in_one_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"'\\udcff' at position 1 is half a character"):
        tokenizer.encode("a\udcff")


@pytest.mark.parametrize("tail", ["", "x"])
def test_endless_blanks_are_kept_from_tiktoken(tail: str) -> None:
    for blank in (" ", "\n", " \t\n"):
        with pytest.raises(DataError, match=r"blanks or newlines in a row.*or use the fast engine"):
            ALL[0].encode("a" + blank * 1_000_000 + tail)
    assert trained_bpe(["abab" * 9, "a" + " " * 1_000_000 + tail], 300).data == trained_bpe(["abab" * 9], 300).data
    assert len(ALL[0].encode("a" + " " * 290_000 + tail)) > 1000


# --- a BPE of our own


def test_the_vocabulary_size_counts_everything() -> None:
    text = "the cat sat on the mat, the rat sat on the hat. " * 5
    assert [trained_bpe([text], size).vocab_size for size in (257, 258, 270)] == [257, 258, 270]
    full = trained_bpe([text], 5000)
    assert 270 < full.vocab_size < 5000  # no more pairs to merge
    assert full.eot_id == full.vocab_size - 1


@pytest.mark.parametrize("size", [-1, 1, 256])
def test_a_vocabulary_without_room_for_bytes_is_refused(size: int) -> None:
    with pytest.raises(DataError, match=rf"--vocab-size {size} is too small.*257"):
        trained_bpe(["text"], size)


def test_training_does_not_depend_on_the_chunks() -> None:
    text = "".join(sample_texts())[:100_000]
    pieces = ((0, Piece(0, 0, at, not at, text[at : at + 999].encode())) for at in range(0, len(text), 999))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prepare.encoder.CHUNK", 0)
        cut = [part.data.decode() for chunk in Chunker(cuts_anywhere=False).chunks(pieces) for part in chunk.parts]
    assert len(cut) > 90
    assert trained_bpe([text], 500).data == trained_bpe(cut, 500).data


# --- words


def test_an_unknown_word_becomes_unk() -> None:
    words = Words([" cat", "the", " sat"])
    assert words.encode("the cat sat").tolist() == [2, 1, 3]
    assert words.encode("the dog sat<|endoftext|>").tolist() == [2, 0, 3, 0, 0, 0, 0, 0]
    assert words.decode([2, 0, 3]) == "the<unk> sat"
    assert (words.vocab_size, words.eot_id) == (5, 4)


def test_frequent_words_are_kept_instead_of_rare_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("b a b a b a c d " * 9 + "rare")
    assert main([str(tmp_path / "a.txt"), "--tokenizer", "word", "--vocab-size", "4"]) == 0
    assert read_meta(tmp_path).tokenizer.specials == {"<unk>": 0, "<|endoftext|>": 3}
    assert set(load_tokenizer(tmp_path).decode(open_split(tmp_path, "train"))) <= set("ab <unk>")
    assert "words are not in the vocabulary and became <unk>" in capsys.readouterr().err
    assert main([str(tmp_path / "a.txt"), "--tokenizer", "word", "--vocab-size", "3"]) == 2
    assert "--vocab-size 3 is too small" in capsys.readouterr().err
    assert main([str(tmp_path / "a.txt"), "--tokenizer", "word", "--vocab-size", "4000"]) == 0
    assert "has no more words" in capsys.readouterr().out


def test_an_id_that_no_token_has_does_not_stop_a_talk() -> None:
    holes = BytePairs("holes", GPT2.data, specials={"<|endoftext|>": 60_000})
    assert (holes.vocab_size, holes.eot_id) == (60_001, 60_000)
    assert holes.decode([31373, 55_555, 60_000]) == "hello\ufffd<|endoftext|>"
