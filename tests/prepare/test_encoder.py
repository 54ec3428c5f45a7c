"""encoder.py: chunked encoding gives the ids of the whole text, in order, on any number of workers."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prepare import encoder, ranks
from prepare.corpus import Piece
from prepare.encoder import BadText, Chunk, Chunker, Coder, Part, decoded
from prepare.engine import Fast, Plain
from prepare.ranks import PATTERNS
from prepare.tokenizer import BytePairs, Bytes, Characters, Words, gpt2
from prepare.tokens import DataError
from tests.conftest import trained_bpe

GPT2 = gpt2()
# Unlike GPT-2's, its tokens may hold several spaces.
TRAINED = trained_bpe(["The ships' hulls,\n            the shops, the   chips.\n\n I'll say: it's 1600! "] * 3, 300)
# GPT-2's tokens, and more where a wrong cut would show: any two or three of these, with a newline in many.
_MEETING = ["".join(some) for n in (2, 3) for some in product("!/.\n\r\t a", repeat=n)]
_MORE = [token.encode() for token in _MEETING if token.encode() not in GPT2.merges]
RANKS = GPT2.data + ranks.dump({token: 50256 + i for i, token in enumerate(_MORE)})
ENCODINGS = {
    "gpt2": GPT2,
    "trained": TRAINED,
    "more": BytePairs("more", RANKS),
    "cl100k_base": BytePairs("cl100k", RANKS, PATTERNS["cl100k_base"]),
    "o200k_base": BytePairs("o200k", RANKS, PATTERNS["o200k_base"]),
}

# What the patterns treat in different ways, above all around blanks.
BLANKS = [" ", "  ", "   ", "\n", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x1c", "\x85"]
WORDS = [
    "a",
    "The",
    "'s",
    "'",
    "'ll",
    "'LL",
    "1",
    "2345",
    "½",
    "é",
    "e\u0301",
    "漢字",
    "語",
    "한",
    "か",
    "_",
    "<|endoftext|>",
]
SIGNS = [".", "!?", "-", "~", "👍🏽", "\x00", "/", "。", "、", "！", "\ufeff"]
ADVERSARIAL = st.lists(st.sampled_from([*BLANKS, *WORDS, *SIGNS]), max_size=60).map("".join)


def pieces(text: str, size: int) -> Iterator[tuple[int, Piece]]:
    data = text.encode()
    return ((0, Piece(0, 0, at, not at, data[at : at + size])) for at in range(0, len(data), size))


def chunks(text: str, size: int, *, cuts_anywhere: bool = False) -> list[Chunk]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "CHUNK", 0)  # cut wherever it may be
        return list(Chunker(cuts_anywhere=cuts_anywhere).chunks(pieces(text, size)))


def joined(parts: Iterator[Part]) -> str:
    return b"".join(part.data for part in parts).decode()


@pytest.mark.parametrize("name", ENCODINGS)
@settings(max_examples=400)
@given(text=ADVERSARIAL | st.text(max_size=80), size=st.integers(1, 40))
@example(text="a " * 50, size=1)
@example(text="end.  Two\n three. \n  four", size=5)
@example(text="a. \u00a0 \u00a0", size=40)  # one token holds two of these blanks: no safe cut between them
@example(text="a" + " " * 12 + "b", size=6)  # nor within a run of them
@example(text="漢字\n漢字。\n\n語\n /語\u3000\n語!\n/x", size=9)
@example(text="x!\n/usr", size=4)
def test_chunked_ids_are_the_ids_of_the_whole(name: str, text: str, size: int) -> None:
    tokenizer = ENCODINGS[name]
    cut = chunks(text, size)
    assert joined(part for chunk in cut for part in chunk.parts) == text
    ids = [token for chunk in cut for part in chunk.parts for token in tokenizer.encode(part.data.decode())]
    assert ids == tokenizer._encoding.encode_ordinary(text)


@settings(max_examples=200)
@given(text=ADVERSARIAL | st.text(max_size=80), size=st.integers(1, 40))
def test_no_cut_is_within_a_word(text: str, size: int) -> None:
    cut = [word for chunk in chunks(text, size) for part in chunk.parts for word in Words.split(part.data.decode())]
    assert cut == Words.split(text)
    assert "".join(cut) == text


@settings(max_examples=200)
@given(text=ADVERSARIAL | st.text(max_size=80), size=st.integers(1, 40))
def test_no_cut_is_within_a_character(text: str, size: int) -> None:
    cut = chunks(text, size, cuts_anywhere=True)
    assert "".join(part.data.decode() for chunk in cut for part in chunk.parts) == text


@settings(max_examples=300)
@given(
    documents=st.lists(st.tuples(st.integers(0, 1), st.text("ab \n漢", min_size=1, max_size=30)), max_size=12),
    size=st.integers(1, 40),
    chunk=st.integers(0, 60),
)
def test_documents_are_parted_and_none_is_lost(documents: list[tuple[int, str]], size: int, chunk: int) -> None:
    stream = (
        (side, piece._replace(source=number))
        for number, (side, text) in enumerate(documents)
        for _, piece in pieces(text, size)
    )
    chunker = Chunker(cuts_anywhere=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "CHUNK", chunk)
        parts = [part for chunk in chunker.chunks(stream) for part in chunk.parts]
    for side in (0, 1):
        expected = [text for where, text in documents if where == side]
        found: list[list[Part]] = [[]]
        for part in parts:
            if part.side == side:
                if part.parted:
                    found.append([])
                found[-1].append(part)
        assert [joined(iter(document)) for document in found if document] == expected
        assert chunker.documents[side] == len(expected)
        assert chunker.bytes[side] == sum(len(text.encode()) for text in expected)
    for part in parts:
        text = documents[part.source][1].encode()
        assert text[part.offset : part.offset + len(part.data)] == part.data


@pytest.mark.parametrize(
    "text", ["One word, then another. " * 4000, "没有空格的一行中文。\n" * 4000], ids=["english", "chinese"]
)
def test_plain_text_is_cut_instead_of_held_whole(text: str) -> None:
    sizes = [chunk.size for chunk in chunks(text, 1000)]
    assert len(sizes) >= 90
    assert max(sizes) < 2100


def test_short_documents_share_a_chunk() -> None:
    documents = ((0, Piece(0, row, 0, True, b"A document of thirty bytes ...")) for row in range(200_000))
    sizes = [chunk.size for chunk in Chunker(cuts_anywhere=False).chunks(documents)]
    assert all(abs(encoder.CHUNK - size) < 30 for size in sizes[:-1])


def test_text_without_a_cut_is_refused_at_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "MAX_CHUNK", 15_000)
    held = "漢字" * 2500
    [chunk] = chunks(held, 300)
    assert joined(iter(chunk.parts)) == held
    with pytest.raises(DataError, match=r"15,300 bytes without .*漢字.*--tokenizer char or byte"):
        chunks(held + held, 300)
    assert len(chunks(held + held, 300, cuts_anywhere=True)) > 50


# --- bytes to ids


@settings(max_examples=200)
@given(data=st.binary(max_size=30))
def test_repaired_text_is_what_python_makes_of_it(data: bytes) -> None:
    assert decoded(data, "replace")[0] == data.decode("utf-8", "replace")
    assert decoded(data, "skip")[0] == data.decode("utf-8", "ignore")
    places = data.decode("utf-8", "replace").count("\ufffd") - data.decode("utf-8", "ignore").count("\ufffd")
    assert decoded(data, "replace")[1] == decoded(data, "skip")[1] == places


def chunk_of(*documents: bytes) -> Chunk:
    return Chunk([Part(i % 2, i > 1, i, 0, 100, data) for i, data in enumerate(documents)])


def test_a_chunk_becomes_the_ids_of_its_documents() -> None:
    coded = Coder(GPT2, Plain(GPT2), "uint16", "skip")(chunk_of(b"one", b"caf\xe9", b"\xfftwo <|endoftext|>\xfe"))
    train, val = (np.frombuffer(ids, dtype="<u2").tolist() for ids in coded.ids)
    assert train == [*GPT2.encode("one"), 50256, *GPT2.encode("two <|endoftext|>")]
    assert val == GPT2.encode("caf").tolist()
    assert coded.repaired == {1: 1, 2: 2}


def test_a_bad_byte_is_named_at_its_place() -> None:
    with pytest.raises(BadText) as caught:
        Coder(GPT2, Plain(GPT2), "uint16", "strict")(chunk_of(b"one", b"caf\xe9"))
    assert caught.value.args == (1, 0, 103, 0xE9)


def test_unknown_words_are_counted() -> None:
    words = Words(["one", " two"])
    coded = Coder(words, Plain(words), "uint16", "strict")(chunk_of(b"one six two"))
    assert np.frombuffer(coded.ids[0], dtype="<u2").tolist() == [1, 0, 2]
    assert coded.unknown == 1


class Wrong(Fast):
    """An engine that errs in its last id."""

    def __init__(self, wrong_id: int) -> None:
        self.wrong_id = wrong_id

    def __call__(self, texts):  # type: ignore[no-untyped-def]
        ids = [GPT2.encode(text) for text in texts]
        ids[-1][-1] = self.wrong_id
        return ids


def test_a_wrong_id_of_the_fast_engine_stops_the_run() -> None:
    coder = Coder(GPT2, Wrong(13), "uint16", "strict")
    with pytest.raises(
        DataError, match=r"fastokens does not give tiktoken's ids for 'one two'\.\.\.: use --engine tiktoken"
    ):
        coder(chunk_of(b"one two"), 0)
    with pytest.raises(DataError, match=r"does not give tiktoken's ids"):
        coder(chunk_of(b"one", b"two " * 4000), 16)
    coder(chunk_of(b"one two"), 1)  # only a sample is checked
    with pytest.raises(DataError, match=r"made id 50257, the vocabulary ends at 50256"):
        Coder(GPT2, Wrong(50257), "uint16", "strict")(chunk_of(b"one two"), 1)


@pytest.mark.parametrize(
    "tokenizer", [GPT2, TRAINED, Bytes(), Characters(map(chr, range(1, 256)))], ids=lambda t: t.name
)
@pytest.mark.parametrize("engine", ["plain", "fast"])
def test_workers_do_not_change_the_order(tokenizer: BytePairs, engine: str, tmp_path: Path) -> None:
    section = tokenizer.save(tmp_path)
    if engine == "fast":
        if not isinstance(tokenizer, BytePairs):
            pytest.skip("the fast engine is for byte pairs")
        coder = Coder(tokenizer, Fast(tokenizer, tmp_path), "uint32", "strict")
    else:
        coder = Coder(tokenizer, Plain(tokenizer), "uint32", "strict")
    numbered = [(i, chunk_of(b"text %d " % i * (5000 // (i + 1)), b"more")) for i in range(12)]
    one, two = (list(encoder.encode(numbered, coder, workers, section, tmp_path)) for workers in (1, 2))
    assert one == two
    assert [chunk for chunk, _ in one] == [chunk for _, chunk in numbered]


def test_the_window_holds_a_bounded_number_of_chunks(tmp_path: Path) -> None:
    section = GPT2.save(tmp_path)
    coder = Coder(GPT2, Fast(GPT2, tmp_path), "uint16", "strict")
    drawn = done = 0

    def ahead() -> Iterator[tuple[int, Chunk]]:
        nonlocal drawn
        for number in range(50):
            drawn += 1
            assert drawn - done <= 5
            yield number, chunk_of(b"text")

    for _ in encoder.encode(ahead(), coder, 2, section, tmp_path):
        done += 1
    assert done == 50
