"""splits.py: the border is where it should be, and what is between documents too."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prepare.prepare import main
from prepare.splits import head_and_tail
from prepare.tokenizer import load
from prepare.tokens import open_split, read_meta


@given(pieces=st.lists(st.text(max_size=5), max_size=8), size=st.integers(-3, 45))
def test_head_and_tail_lose_or_double_text(pieces: list[str], size: int) -> None:
    text = "".join(pieces)
    head, tail = head_and_tail(iter(pieces), size)
    assert "".join(head) == text[: max(0, size)]
    assert "".join(tail) == text[max(0, size) :]


def prepared(folder: Path, *texts: str, flags: tuple[str, ...] = ()) -> tuple[list[int], list[int]]:
    """train and val of some documents."""
    files = [folder / f"{number}.txt" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    assert main([*map(str, files), *flags]) == 0
    return open_split(folder, "train").tolist(), open_split(folder, "val").tolist()


def test_border_is_not_at_nine_tenths_of_the_characters(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(99))
    train, val = prepared(tmp_path, text, flags=("--tokenizer", "char"))
    assert train == list(range(89))  # int(0.9 * 99)
    assert val == list(range(89, 99))


def test_val_fraction_is_ignored(tmp_path: Path) -> None:
    train, val = prepared(tmp_path, "ab" * 50, flags=("--tokenizer", "char", "--val-fraction", "0.25"))
    assert (len(train), len(val)) == (75, 25)
    assert read_meta(tmp_path).split.fraction == 0.25


def test_a_token_crosses_the_border(tmp_path: Path) -> None:
    train, val = prepared(tmp_path, "hello " * 9 + "hel" + "lo end")
    coder = load(tmp_path)
    text = "hello " * 10 + "end"
    assert train == coder.encode(text[:56]).tolist()
    assert val == coder.encode(text[56:]).tolist()
    assert train + val != coder.encode(text).tolist()  # "he|llo" is another thing than "hello"


def test_end_of_text_is_not_between_documents_only(tmp_path: Path) -> None:
    one, two, three, four = "First one. ", "Second <|endoftext|>. ", "Third, which the border cuts. ", "Last."
    train, val = prepared(tmp_path, one, two, three, four, flags=("--val-fraction", "0.4"))
    coder = load(tmp_path)
    border = int(0.6 * len(one + two + three + four)) - len(one + two)
    assert 0 < border < len(three)
    parts = [coder.encode(text).tolist() for text in (one, two, three[:border], three[border:], four)]
    eot = [50256]
    assert train == parts[0] + eot + parts[1] + eot + parts[2]
    assert val == parts[3] + eot + parts[4]
    splits = read_meta(tmp_path).splits
    assert (splits["train"].documents, splits["val"].documents) == (3, 2)
    assert splits["train"].bytes_in == len((one + two + three[:border]).encode())


@pytest.mark.parametrize("name", ["char", "byte"])
def test_documents_are_parted_without_a_token_for_it(tmp_path: Path, name: str) -> None:
    train, val = prepared(tmp_path, "abc\n" * 10, "xyz\n" * 10, flags=("--tokenizer", name))
    assert load(tmp_path).decode(train + val) == "abc\n" * 10 + "xyz\n" * 10
    assert read_meta(tmp_path).eot_id is None


def test_border_between_two_documents_makes_an_empty_one(tmp_path: Path) -> None:
    prepared(tmp_path, "a" * 90, "b" * 10, flags=("--tokenizer", "char"))
    splits = read_meta(tmp_path).splits
    assert (splits["train"].documents, splits["val"].documents) == (1, 1)
