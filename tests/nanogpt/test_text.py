"""text.py: text as its ids come, in whole characters and up to a stop."""

from collections.abc import Iterable

import pytest

from model_zoo.nanogpt.text import text_stream
from prepare.tokenizer import Bytes
from tests.conftest import trained_bpe


def streamed(data: bytes, stops: Iterable[str] = ()) -> list[str]:
    return list(text_stream(data, Bytes(), stops))


def test_a_character_spread_over_ids_comes_whole_and_ordinary_text_at_once() -> None:
    assert streamed("a€😀b".encode())[:4] == ["a", "€", "😀", "b"]


def test_bytes_that_are_not_text_become_replacement_characters_and_hold_nothing_up() -> None:
    assert "".join(streamed(b"a\xffb\xe2\x82")) == "a\ufffdb\ufffd"


@pytest.mark.parametrize("stops", [["STOP"], ["STOP", "never"], ["OP", "STOP"], ["STOP two", "STOP"], ["", "STOP"]])
def test_a_stop_spread_over_ids_is_found_and_left_out(stops: list[str]) -> None:
    assert "".join(streamed(b"one STO SSTOP two", stops)) == "one STO S"


def test_a_stop_of_characters_of_many_bytes_is_found() -> None:
    assert "".join(streamed("so €😀 it ends".encode(), ["€😀"])) == "so "


def test_the_earliest_of_two_stops_in_one_id_ends_the_text() -> None:
    tokenizer = trained_bpe(["hello world hello world hello world"], 300)
    ids = tokenizer.encode("hello world").tolist()
    assert len(ids) <= 2
    assert "".join(text_stream(ids, tokenizer, ["wor", "ell"])) == "h"


def test_text_that_only_begins_like_a_stop_is_not_lost_at_the_end() -> None:
    pieces = streamed(b"abcST", ["STOP"])
    assert pieces[:3] == ["a", "b", "c"]  # not held back: no stop begins like this
    assert "".join(pieces) == "abcST"
