"""splits.py: train and val are divided at the right place, with end-of-text between documents."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prepare import splits
from prepare.corpus import Piece
from prepare.data import load_tokenizer, open_split, read_meta
from prepare.prepare import main
from prepare.splits import by_hash, by_tail


def pieces(documents: list[str], size: int) -> Iterator[Piece]:
    for number, document in enumerate(documents):
        data = document.encode()
        yield from (Piece(number, 0, at, not at, data[at : at + size]) for at in range(0, len(data), size))


@given(documents=st.lists(st.text(max_size=12), max_size=6), size=st.integers(1, 9), border=st.integers(0, 45))
def test_head_and_tail_are_the_whole_text(documents: list[str], size: int, border: int) -> None:
    text = "".join(documents)
    sides = [b"", b""]
    for side, piece in by_tail(pieces(documents, size), border):
        assert piece.data
        assert documents[piece.source].encode()[piece.offset :].startswith(piece.data)
        sides[side] += piece.data
    assert [side.decode() for side in sides] == [text[:border], text[border:]]


@given(documents=st.lists(st.text(min_size=1, max_size=9), max_size=9), size=st.integers(1, 9), head=st.integers(1, 12))
def test_the_hash_depends_on_the_document_alone(documents: list[str], size: int, head: int) -> None:
    def sides_of(documents: list[str], size: int) -> dict[str, int]:
        found: dict[str, int] = {}
        text: dict[int, bytes] = {}
        for side, piece in by_hash(pieces(documents, size), 7, 0.5):
            text[piece.source] = text.get(piece.source, b"") + piece.data
            assert found.setdefault(documents[piece.source], side) == side  # copies too
        assert [data.decode() for data in text.values()] == documents
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "HEAD_BYTES", head)
        assert sides_of(documents, size) == sides_of(documents[::-1], 100)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_the_hash_gives_val_its_share(fraction: float) -> None:
    documents = [f"document {number}" for number in range(20_000)]
    shares = [
        sum(side for side, _ in by_hash(pieces(documents, 99), seed, fraction)) / len(documents) for seed in (0, 1, -1)
    ]
    assert all(abs(share - fraction) < 0.1 * fraction**0.5 for share in shares)
    assert len(set(shares)) == 3


def prepared(folder: Path, *texts: str, flags: tuple[str, ...] = ()) -> tuple[list[int], list[int]]:
    """train and val of some documents."""
    files = [folder / f"{number}.txt" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    assert main([*map(str, files), *flags]) == 0
    return open_split(folder, "train").tolist(), open_split(folder, "val").tolist()


def test_the_border_is_at_nine_tenths_of_the_characters(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(99))
    train, val = prepared(tmp_path, text, flags=("--tokenizer", "char"))
    assert train == list(range(89))  # int(0.9 * 99)
    assert val == list(range(89, 99))


def test_val_fraction_moves_the_border(tmp_path: Path) -> None:
    train, val = prepared(tmp_path, "ab" * 50, flags=("--tokenizer", "char", "--val-fraction", "0.25"))
    assert (len(train), len(val)) == (75, 25)
    assert read_meta(tmp_path).split.fraction == 0.25


def test_no_token_crosses_the_border(tmp_path: Path) -> None:
    train, val = prepared(tmp_path, "hello " * 9 + "hel" + "lo end")
    coder = load_tokenizer(tmp_path)
    text = "hello " * 10 + "end"
    assert train == coder.encode(text[:56]).tolist()
    assert val == coder.encode(text[56:]).tolist()
    assert train + val != coder.encode(text).tolist()  # "he|llo" is another thing than "hello"


def test_end_of_text_is_between_documents_only(tmp_path: Path) -> None:
    one, two, three, four = "First one. ", "Second <|endoftext|>. ", "Third, which the border cuts. ", "Last."
    train, val = prepared(tmp_path, one, two, "", three, four, flags=("--val-fraction", "0.4"))
    coder = load_tokenizer(tmp_path)
    border = int(0.6 * len(one + two + three + four)) - len(one + two)
    assert 0 < border < len(three)
    parts = [coder.encode(text).tolist() for text in (one, two, three[:border], three[border:], four)]
    eot = [50256]
    assert train == parts[0] + eot + parts[1] + eot + parts[2]
    assert val == parts[3] + eot + parts[4]
    meta = read_meta(tmp_path)
    assert (meta.splits["train"].documents, meta.splits["val"].documents) == (3, 2)
    assert meta.splits["train"].bytes_in == len((one + two + three[:border]).encode())
    assert [source.documents for source in meta.inputs] == [1, 1, 0, 1, 1]


@pytest.mark.parametrize("name", ["char", "byte"])
def test_documents_need_no_token_that_the_vocabulary_lacks(tmp_path: Path, name: str) -> None:
    train, val = prepared(tmp_path, "abc\n" * 10, "xyz\n" * 10, flags=("--tokenizer", name))
    assert load_tokenizer(tmp_path).decode(train + val) == "abc\n" * 10 + "xyz\n" * 10
    assert read_meta(tmp_path).eot_id is None


def test_a_border_between_two_documents_makes_no_empty_one(tmp_path: Path) -> None:
    prepared(tmp_path, "a" * 90, "b" * 10, flags=("--tokenizer", "char"))
    splits = read_meta(tmp_path).splits
    assert (splits["train"].documents, splits["val"].documents) == (1, 1)


@pytest.mark.parametrize("count", [101, 100])
def test_many_documents_are_split_by_hash_and_few_by_their_tail(tmp_path: Path, count: int) -> None:
    assert splits.many(0.1) == 101
    documents = [f"Document number {number} is here." for number in range(count)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    assert main([str(file)]) == 0
    meta = read_meta(tmp_path)
    coder = load_tokenizer(tmp_path)
    sides = [coder.decode(open_split(tmp_path, side)).split("<|endoftext|>") for side in ("train", "val")]
    if count < splits.many(0.1):
        assert (meta.split.method, meta.split.seed) == ("tail", None)
        assert "".join(sides[0] + sides[1]) == "".join(documents)
        assert meta.splits["val"].bytes_in == pytest.approx(0.1 * meta.inputs[0].bytes, abs=1)
    else:
        assert (meta.split.method, meta.split.seed) == ("hash", 0)
        assert sorted(sides[0] + sides[1]) == sorted(documents)
        assert all(documents.index(a) < documents.index(b) for side in sides for a, b in pairwise(side))
        before = sides
        assert main([str(file), "--seed", "1"]) == 0
        assert [coder.decode(open_split(tmp_path, side)).split("<|endoftext|>") for side in ("train", "val")] != before


def test_a_side_without_documents_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("one|two")
    assert main([str(tmp_path / "a.txt"), "--separator", "|", "--split", "hash", "--val-fraction", "0.001"]) == 2
    assert "val.bin would get 0 tokens" in (error := capsys.readouterr().err)
    assert "or --split tail" in error
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt"}
