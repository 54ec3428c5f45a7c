"""KServe's Open Inference Protocol v2, as its clients speak it."""

from typing import Any

import pytest

from tests.nanogpt.serving.conftest import Served


def infer(served: Served, *prompts: str, route: str = "/v2/models/gpt/infer", **parameters: Any) -> Any:
    tensor = {"name": "text_input", "shape": [len(prompts)], "datatype": "BYTES", "data": prompts}
    answer = served.http.post(route, json={"id": "42", "inputs": [tensor], "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_metadata_names_the_tensors_and_the_step_as_version(alphabet: Served) -> None:
    assert alphabet.http.get("/v2").json().keys() == {"name", "version", "extensions"}
    model = alphabet.http.get("/v2/models/gpt").json()
    assert (model["name"], model["versions"]) == ("gpt", ["7"])
    assert model["inputs"] == [{"name": "text_input", "datatype": "BYTES", "shape": [-1]}]
    assert model["outputs"] == [{"name": "text_output", "datatype": "BYTES", "shape": [-1]}]
    assert alphabet.http.get("/v2/models/gpt/versions/7").json() == model


def test_server_and_model_are_live_and_ready(alphabet: Served) -> None:
    assert alphabet.http.get("/v2/health/live").json() == {"live": True}
    assert alphabet.http.get("/v2/health/ready").json() == {"ready": True}
    for where in ("gpt", "gpt/versions/7"):
        assert alphabet.http.get(f"/v2/models/{where}/ready").json() == {"name": "gpt", "ready": True}


@pytest.mark.parametrize("where", ["gpt", "gpt/versions/7"])
def test_prompts_are_a_tensor_of_bytes_and_so_are_the_answers(where: str, alphabet: Served) -> None:
    found = infer(alphabet, "abc", "x", route=f"/v2/models/{where}/infer", max_tokens=2, temperature=0)
    assert (found["model_name"], found["model_version"], found["id"]) == ("gpt", "7", "42")
    assert found["outputs"] == [{"name": "text_output", "datatype": "BYTES", "shape": [2], "data": ["de", "yz"]}]


def test_parameters_are_followed(random_bytes: Served) -> None:
    drawn = {"seed": 3, "max_tokens": 12, "top_p": 0.9, "top_k": 50}
    first = infer(random_bytes, "ab", "ab", **drawn)["outputs"][0]["data"]
    assert first[0] != first[1]
    assert infer(random_bytes, "ab", "ab", **drawn)["outputs"][0]["data"] == first


TENSOR = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["a"]}


@pytest.mark.parametrize(
    ("where", "changes", "status", "words"),
    [
        ("gpt", {"inputs": []}, 400, "at least 1 item"),
        ("gpt", {"inputs": [TENSOR | {"name": "text"}]}, 400, "inputs.0.name"),
        ("gpt", {"inputs": [TENSOR | {"datatype": "FP32"}]}, 400, "inputs.0.datatype"),
        ("gpt", {"inputs": [TENSOR | {"shape": [2]}]}, 400, "shape [2] is of 2 prompts, data has 1"),
        ("gpt", {"inputs": [TENSOR | {"data": [1]}]}, 400, "inputs.0.data.0"),
        ("gpt", {"parameters": {"maxtokens": 1}}, 400, "parameters.maxtokens"),
        ("gpt", {"outputs": [{"name": "logits"}]}, 400, "outputs.0.name"),
        ("other", {}, 404, "no model 'other'"),
        ("gpt/versions/8", {}, 404, "no version '8'"),
    ],
)
def test_a_mistake_is_one_line_under_error(
    where: str, changes: dict[str, Any], status: int, words: str, alphabet: Served
) -> None:
    answer = alphabet.http.post(f"/v2/models/{where}/infer", json={"inputs": [TENSOR]} | changes)
    assert answer.status_code == status
    assert answer.json().keys() == {"error"}
    assert words in answer.json()["error"]
