"""Prompts become generations, and their tokens text that is always whole characters."""

import asyncio
import json

import pytest

from model_zoo.nanogpt.serving.completions import Options
from model_zoo.nanogpt.serving.refusal import Refusal
from prepare.tokenizer import Bytes
from tests.conftest import until
from tests.nanogpt.serving.conftest import FOREVER, Served, endless, serving, small
from tests.nanogpt.test_generate import ACCENTS, reciter


def test_time_that_is_over_ends_an_answer_in_the_form_that_it_has() -> None:
    with small(seconds=0.3) as served:
        answer = served.http.post("/v1/completions", json={"model": "gpt", "prompt": "a", "max_tokens": FOREVER})
        assert answer.status_code == 503
        assert "more than 0.3 s: ask for fewer tokens" in answer.json()["error"]["message"]
        with endless(served) as streamed:
            *_, last = [line for line in streamed.iter_lines() if line]
        assert "more than 0.3 s" in json.loads(last.removeprefix("data: "))["error"]["message"]
        until(served.idle)


def test_every_event_of_a_stream_is_whole_characters_whose_bytes_came_apart() -> None:
    wanted = {"model": "gpt", "prompt": "n", "max_tokens": 40, "temperature": 0, "stream": True, "n": 2}
    with serving(reciter(list(ACCENTS.encode()), 256), Bytes()) as served:
        answer = served.http.post("/v1/completions", json=wanted)
        whole = served.complete(prompt="n", max_tokens=40, temperature=0)["choices"][0]["text"]
    texts = ["", ""]
    for event in answer.content.split(b"\n\n")[:-2]:
        choice = json.loads(event.decode().removeprefix("data: "))["choices"][0]  # each is UTF-8 by itself
        texts[choice["index"]] += choice["text"]
    assert texts == [whole, whole]
    assert "ï" in whole


def test_a_seed_is_numbered_by_place_and_stays_one() -> None:
    assert [Options(1, 1.0, seed=2**53 - 1).numbered(place).seed for place in (0, 1)] == [2**53 - 1, 2**53]
    assert Options(1, 1.0, seed=-1).numbered(0).seed == 2**64 - 1
    assert Options(1, 1.0).numbered(3).seed is None


def test_a_prompt_that_the_model_cannot_take_is_refused_with_its_name(alphabet: Served) -> None:
    for prompt, words in (("aß", "ß"), ([27], "token id 27"), ("a" * 17, "17 tokens"), ("\ud800", "half a character")):
        with pytest.raises(Refusal, match=words) as caught:
            asyncio.run(alphabet.service.encode(prompt, param="prompts"))
        assert (caught.value.status, caught.value.param) == (400, "prompts")
