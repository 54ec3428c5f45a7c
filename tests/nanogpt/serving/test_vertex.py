"""Vertex AI's contract: what its prediction service and Google's clients send and read."""

from typing import Any

import pytest

from prepare.tokenizer import Characters
from tests.nanogpt.serving.conftest import Served, serving
from tests.nanogpt.test_generate import ALPHABET, reciter


def predict(served: Served, *instances: Any, **parameters: Any) -> Any:
    answer = served.http.post("/predict", json={"instances": instances, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    assert answer.json().keys() == {"predictions"}
    return answer.json()["predictions"]


def test_strings_get_strings_in_order(alphabet: Served) -> None:
    assert predict(alphabet, "abc", "x", maxOutputTokens=2, temperature=0) == ["de", "yz"]


def test_objects_get_objects_and_have_parameters_of_their_own(alphabet: Served) -> None:
    found = predict(
        alphabet, {"prompt": "a"}, {"prompt": "c", "maxOutputTokens": 1}, "f", maxOutputTokens=3, temperature=0
    )
    assert found == [
        {"text": "bcd", "finishReason": "length", "tokens": 3, "step": 7},
        {"text": "d", "finishReason": "length", "tokens": 1, "step": 7},
        "ghi",
    ]


def test_the_same_prompt_twice_gets_two_answers_which_the_seed_repeats(random_bytes: Served) -> None:
    first = predict(random_bytes, "ab", "ab", seed=3, maxOutputTokens=12, topP=0.9, topK=50)
    assert first[0] != first[1]
    assert predict(random_bytes, "ab", "ab", seed=3, maxOutputTokens=12, topP=0.9, topK=50) == first


def test_stop_sequences_end_an_answer(alphabet: Served) -> None:
    assert predict(alphabet, "a", temperature=0, stopSequences=["f", "e"]) == ["bcd"]


def test_without_parameters_it_answers_as_the_terminal_does(alphabet: Served) -> None:
    answer = alphabet.http.post("/predict", json={"instances": ["a"]})
    assert len(answer.json()["predictions"][0]) == 256


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"instances": []}, "instances: List should have at least 1 item"),
        ({"instances": "abc"}, "instances: Input should be a valid list"),
        ({"instances": [1]}, "instances.0"),
        ({"instances": ["aß"]}, "'ß'"),
        ({"instances": ["a"], "parameters": {"temperatur": 1}}, "parameters.temperatur"),
        ({"instances": ["a"] * 13}, "13 generations"),
        ({}, "instances: Field required"),
        ([], "JSON object"),
    ],
    ids=str,
)
def test_a_mistake_is_refused_as_google_says_it(body: Any, words: str, alphabet: Served) -> None:
    answer = alphabet.http.post("/predict", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["status"]) == (400, "INVALID_ARGUMENT")
    assert words in error["message"]


def test_routes_are_where_vertex_ai_wants_them() -> None:
    tokenizer = Characters(ALPHABET)
    model = reciter(tokenizer.encode(ALPHABET).tolist(), 27)
    where = "/v1/endpoints/12/deployedModels/34:predict"
    with serving(model, tokenizer, health_route="/v1/endpoints/12/deployedModels/34", predict_route=where) as served:
        answer = served.http.post(where, json={"instances": ["a"], "parameters": {"maxOutputTokens": 1}})
        assert len(answer.json()["predictions"]) == 1
        assert served.http.get("/v1/endpoints/12/deployedModels/34").json()["status"] == "ok"
        assert served.http.post(where, json={}).json()["error"]["status"] == "INVALID_ARGUMENT"
        assert served.http.post("/predict", json={"instances": ["a"]}).status_code == 404
