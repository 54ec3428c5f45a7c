"""openai.py: OpenAI's own client works, and gets what the model alone would generate."""

import json
import math
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch

from model_zoo.nanogpt.engine import Request, generate
from prepare.tokenizer import Bytes
from tests.conftest import trained_bpe
from tests.nanogpt.serving.conftest import Served, serving
from tests.nanogpt.test_generate import ACCENTS, reciter


def client(served: Served, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)


def alone(served: Served, prompt: list[int], seed: int, tokens: int = 12) -> str:
    """The text that the model generates for a single request, without the server."""
    ids = generate(served.model, Request(prompt, tokens, seed=seed), served.service.tokenizer.vocab_size)
    return served.service.tokenizer.decode(list(ids))


def test_a_prompt_is_continued_and_everything_that_a_client_reads_is_there(alphabet: Served) -> None:
    answer = client(alphabet).completions.create(model="gpt", prompt="abc", max_tokens=5, temperature=0)
    assert answer.object == "text_completion"
    assert answer.model == "gpt"
    assert answer.id.startswith("cmpl-")
    assert answer.system_fingerprint == "step-7"
    [choice] = answer.choices
    assert (choice.text, choice.index, choice.finish_reason, choice.logprobs) == ("defgh", 0, "length", None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 5, 8)


def test_the_models_are_listed_and_found_by_name(alphabet: Served) -> None:
    [model] = client(alphabet).models.list().data
    assert (model.id, model.object, model.owned_by) == ("gpt", "model", "elastic-gpt")
    assert client(alphabet).models.retrieve("gpt") == model
    assert model.model_extra == {"step": 7, "parameters": alphabet.model.parameter_count(), "context": 16}
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client(alphabet).models.retrieve("other")


def test_a_stream_is_the_whole_answer_in_pieces_with_usage_at_the_end(alphabet: Served) -> None:
    events = list(
        client(alphabet).completions.create(
            model="gpt", prompt="abc", max_tokens=5, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert [event.choices[0].text for event in events[:-1]] == list("defgh")
    assert [event.choices[0].finish_reason for event in events[:-1]] == [None] * 4 + ["length"]
    assert all(event.usage is None for event in events[:-1])
    assert events[-1].choices == []
    assert events[-1].usage is not None
    assert events[-1].usage.total_tokens == 8
    assert len({event.id for event in events}) == 1


def test_a_stream_is_server_sent_events_up_to_done_without_usage_where_none_was_asked_for(alphabet: Served) -> None:
    wanted = {"model": "gpt", "prompt": "x", "max_tokens": 2, "stream": True}
    answer = alphabet.http.post("/v1/completions", json=wanted)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["cd"]),
        (["ab", "xy"], ["cd", "z\n"]),
        ([1, 2], ["cd"]),
        ([[1, 2], [24, 25]], ["cd", "z\n"]),
        ("", ["ab"]),
        (None, ["ab"]),
    ],
)
def test_prompts_are_strings_and_ids_and_lists_of_them(prompt: Any, texts: list[str], alphabet: Served) -> None:
    answer = alphabet.complete(prompt=prompt, max_tokens=2, temperature=0)
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))


def test_n_answers_of_each_prompt_are_those_of_following_seeds_alone(random_bytes: Served) -> None:
    found = random_bytes.complete(prompt=["ab", "c"], n=3, max_tokens=12, seed=5)["choices"]
    prompts = [list(b"ab")] * 3 + [list(b"c")] * 3
    assert [choice["text"] for choice in found] == [
        alone(random_bytes, prompt, 5 + place) for place, prompt in enumerate(prompts)
    ]


def test_a_stream_of_several_answers_mixes_none_up(random_bytes: Served) -> None:
    texts: dict[int, str] = {}
    for event in client(random_bytes).completions.create(
        model="gpt", prompt=["ab", "c"], n=2, max_tokens=12, seed=5, stream=True
    ):
        texts[event.choices[0].index] = texts.get(event.choices[0].index, "") + event.choices[0].text
    whole = random_bytes.complete(prompt=["ab", "c"], n=2, max_tokens=12, seed=5)["choices"]
    assert texts == {choice["index"]: choice["text"] for choice in whole}


def test_the_best_of_several_is_the_one_that_the_model_finds_likeliest(random_bytes: Served) -> None:
    def mean(choice: Any) -> float:
        found = choice["logprobs"]["token_logprobs"]
        return sum(found) / len(found)

    wanted = {"prompt": "ab", "max_tokens": 6, "seed": 3, "logprobs": 0}
    all_five = random_bytes.complete(n=5, **wanted)["choices"]
    best = random_bytes.complete(n=2, best_of=5, **wanted)
    expected = sorted(all_five, key=mean, reverse=True)[:2]
    assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in expected]
    assert best["usage"]["completion_tokens"] == 30  # of all that were drawn


@pytest.mark.parametrize("stop", ["h", ["never", "hi"], ["ghi", "j"]])
def test_a_stop_ends_the_text_and_is_left_out(stop: Any, alphabet: Served) -> None:
    wanted = {"prompt": "abc", "max_tokens": 100, "temperature": 0, "stop": stop}
    [choice] = alphabet.complete(**wanted)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("def" if "ghi" in stop else "defg", "stop")
    streamed = list(client(alphabet).completions.create(model="gpt", stream=True, **wanted))
    assert "".join(event.choices[0].text for event in streamed) == choice["text"]
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_an_end_of_text_ends_the_answer() -> None:
    tokenizer = trained_bpe(["abc"], 257)
    ids = [256, *tokenizer.encode("xyz").tolist()]
    with serving(reciter(ids, 257), tokenizer) as served:
        [choice] = served.complete(prompt="x", max_tokens=100, temperature=0)["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("yz", "stop")


def test_log_probabilities_are_the_models_own_of_prompt_and_answer(random_bytes: Served) -> None:
    answer = random_bytes.complete(prompt="hello", max_tokens=4, seed=1, logprobs=2, echo=True)
    [choice] = answer["choices"]
    found = choice["logprobs"]
    ids = [*b"hello", *generate(random_bytes.model, Request(list(b"hello"), 4, seed=1), 256)]
    with torch.no_grad():
        expected = random_bytes.model(torch.tensor([ids]))[0].log_softmax(-1)
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(
        [float(expected[place, id_]) for place, id_ in enumerate(ids[1:])], abs=1e-4
    )
    for place, top in enumerate(found["top_logprobs"][1:]):
        assert list(top.values()) == pytest.approx(expected[place].topk(2).values.tolist(), abs=1e-4)
    assert found["tokens"][:5] == list("hello")
    assert found["text_offset"][:6] == [0, 1, 2, 3, 4, 5]
    assert choice["text"].startswith("hello")


def test_echo_of_no_new_tokens_scores_a_text(random_bytes: Served) -> None:
    """What programs that measure models ask for."""
    [choice] = random_bytes.complete(prompt="hello", max_tokens=0, logprobs=0, echo=True)["choices"]
    assert (choice["text"], choice["finish_reason"], len(choice["logprobs"]["token_logprobs"])) == (
        "hello",
        "length",
        5,
    )
    [streamed] = [
        event.choices[0]
        for event in client(random_bytes).completions.create(
            model="gpt", prompt="hello", max_tokens=0, echo=True, stream=True
        )
        if event.choices[0].text
    ]
    assert streamed.text == "hello"


def test_a_character_of_many_ids_is_whole_in_the_text_and_told_as_bytes_among_the_tokens() -> None:
    ids = list(ACCENTS.encode())
    with serving(reciter(ids, 256), Bytes()) as served:
        events = list(
            client(served).completions.create(
                model="gpt", prompt="n", max_tokens=10, temperature=0, logprobs=0, stream=True
            )
        )
    texts = [event.choices[0].text for event in events]
    assert texts == ["a", "ï", "v", "e", " ", "€", "\ufffd"]  # the last one was cut
    tokens = [token for event in events for token in event.choices[0].logprobs.tokens]  # type: ignore[union-attr]
    assert tokens[:3] == ["a", "bytes:\\xc3", "bytes:\\xaf"]
    offsets = [offset for event in events for offset in event.choices[0].logprobs.text_offset]  # type: ignore[union-attr]
    assert offsets == [0, 1, 1, 2, 3, 4, 5, 5, 5, 6]


def test_tokens_of_a_stop_are_not_told() -> None:
    with serving(reciter(list(ACCENTS.encode()), 256), Bytes()) as served:
        [choice] = served.complete(prompt="n", max_tokens=50, temperature=0, logprobs=0, stop="e €")["choices"]
    assert choice["text"] == "aïv"
    assert len(choice["logprobs"]["tokens"]) == 4


def test_a_likeliest_token_is_drawn_where_the_nucleus_is_empty(random_bytes: Served) -> None:
    wanted = {"prompt": "ab", "max_tokens": 8}
    greedy = random_bytes.complete(temperature=0, **wanted)["choices"][0]["text"]
    assert random_bytes.complete(top_p=0, **wanted)["choices"][0]["text"] == greedy


REFUSED = [
    ({"prompt": "a", "max_tokenz": 1}, "max_tokenz", "Unrecognized request argument supplied: max_tokenz"),
    ({"prompt": "a", "max_tokens": "1"}, "max_tokens", "valid integer"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens", "valid integer"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    ({"prompt": "a", "temperature": 2.1}, "temperature", "less than or equal to 2"),
    ({"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
    ({"prompt": "a", "n": 129}, "n", "less than or equal to 128"),
    ({"prompt": "a", "logprobs": 6}, "logprobs", "less than or equal to 5"),
    ({"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}, "stop", ""),
    ({"prompt": {"text": "a"}}, "prompt", ""),
    ({"prompt": []}, "prompt", ""),
    ({"prompt": [27]}, "prompt", "token id 27 is not one of 0 to 26"),
    ({"prompt": "aß"}, "prompt", "'ß'"),
    ({"prompt": "\ud800"}, "prompt", ""),
    ({"prompt": "a" * 17}, "prompt", "17 tokens, this model's context 16"),
    ({"prompt": "a", "max_tokens": 100_001}, None, "100001 new tokens are more than the 100000 allowed here"),
    ({"prompt": "a", "n": 13}, None, "13 generations a request are more than the 12 allowed here"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
    ({"prompt": "a", "logit_bias": {"1": 5}}, "logit_bias", "not supported"),
    ({"prompt": "a", "presence_penalty": 1}, "presence_penalty", "not supported"),
    ({"prompt": "a", "n": 3, "best_of": 2}, "best_of", "at least n"),
    ({"prompt": "a", "best_of": 2, "stream": True}, "best_of", "streamed"),
    ({"prompt": "a", "stream_options": {}}, "stream_options", "stream: true"),
]


@pytest.mark.parametrize(("wanted", "param", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_mistake_is_refused_with_the_parameter_and_the_reason(
    wanted: dict[str, Any], param: str | None, words: str, alphabet: Served
) -> None:
    body = json.dumps({"model": "gpt"} | wanted).encode()
    answer = alphabet.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert "\n" not in error["message"]


def test_the_client_raises_what_it_raises_for_the_real_one(alphabet: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="context 16") as caught:
        client(alphabet).completions.create(model="gpt", prompt="a" * 17)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client(alphabet).completions.create(model="gpt-9", prompt="a")
    assert missing.value.code == "model_not_found"


def test_parameters_without_effect_are_taken(alphabet: Served) -> None:
    nothing = {"user": "me", "suffix": None, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0}
    assert alphabet.complete(prompt="a", max_tokens=1, temperature=0, **nothing)["choices"][0]["text"] == "b"


def test_no_answer_holds_a_nan(random_bytes: Served) -> None:
    answer = random_bytes.http.post(
        "/v1/completions", json={"model": "gpt", "prompt": "a", "max_tokens": 3, "logprobs": 5, "echo": True}
    )
    assert isinstance(answer, httpx.Response)
    for value in answer.json()["choices"][0]["logprobs"]["token_logprobs"][1:]:
        assert math.isfinite(value)
