"""Many requests generated from the server's OpenAPI document: none breaks it, and each answer is as documented."""

import collections
from typing import Any

import hypothesis
import pytest

from tests.nanogpt.serving.conftest import Served

schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

UNSAID = (
    "tokens, this model's context",
    "new tokens are more than",
    "generations a request are more than",
    "prompts, data has",
    "token id",
    "not supported by this model",
    "best_of",
    "stream_options is for stream: true",
)
"""Why a request may be refused that the document allows: it is about two fields, or about tokens."""


def test_what_the_document_allows_is_taken_and_each_answer_is_one_that_it_has(random_bytes: Served) -> None:
    """Not through schemathesis' own plugin, which pytest 9.2 has left behind."""
    document = schemathesis.openapi.from_url(f"{random_bytes.url}/openapi.json")
    answered: collections.Counter[tuple[str, int]] = collections.Counter()

    def check(case: Any) -> None:
        # Which model is here, and of which step, only the server knows.
        here = {"name": "gpt", "number": "7"}
        case.path_parameters = {name: here[name] for name in case.path_parameters}
        if case.operation.label == "POST /v1/completions":
            case.body["model"] = "gpt"
        answer = case.call()
        case.validate_response(answer, excluded_checks=[positive_data_acceptance])
        answered[case.operation.label, answer.status_code] += 1
        assert answer.status_code < 400 or any(reason in answer.text for reason in UNSAID), (case.body, answer.text)

    for found in document.get_all_operations():
        asked = hypothesis.given(found.ok().as_strategy())(check)
        hypothesis.settings(max_examples=12, suppress_health_check=list(hypothesis.HealthCheck))(asked)()
    assert len({label for label, status in answered if status == 200}) == 16
    print(f"{len({label for label, _ in answered})} operations, {answered.total()} requests: {dict(answered)}")


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/completions", {"model": "gpt", "prompt": [97.0], "max_tokens": 2.0, "n": 1.0, "seed": 3.0}),
        ("/predict", {"instances": [{"prompt": "a", "maxOutputTokens": 2.0}], "parameters": {"topK": 5.0}}),
        (
            "/v2/models/gpt/infer",
            {
                "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1.0], "data": ["a"]}],
                "parameters": {"max_tokens": 2.0},
            },
        ),
    ],
)
def test_a_whole_number_may_be_written_with_a_point(route: str, body: Any, random_bytes: Served) -> None:
    answer = random_bytes.http.post(route, json=body)
    assert answer.status_code == 200, answer.text


INFER = "/v2/models/gpt/infer"


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/completions", r'{"model": "gpt", "prompt": "a\ud800"}'),
        ("/v1/completions", r'{"model": "gpt", "prompt": ["a", "\udc00"], "stream": true}'),
        ("/v1/completions", r'{"model": "gpt", "prompt": "a", "stop": "\ud800"}'),
        ("/v1/completions", r'{"model": "gpt", "prompt": "a", "user": "\ud800"}'),
        ("/predict", r'{"instances": ["\ud800"]}'),
        ("/predict", r'{"instances": [{"prompt": "a", "stopSequences": ["\ud800"]}]}'),
        (INFER, r'{"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["\ud800"]}]}'),
        (
            INFER,
            r'{"id": "\ud800", "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}',
        ),
    ],
)
def test_half_a_character_is_refused_as_the_document_says(route: str, body: str, random_bytes: Served) -> None:
    answer = random_bytes.http.post(route, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert "half a character (a lone surrogate)" in answer.text
    paths = random_bytes.http.get("/openapi.json").json()["paths"]
    said = paths[route.replace("gpt", "{name}")]["post"]["responses"]["400"]["description"]
    assert "half a character (a lone surrogate" in said
