"""app.py: what the server refuses, whom it lets in, what it frees, and its metrics."""

import contextlib
import json
import re
import socket
import threading

import pytest

from model_zoo.nanogpt.serving import app, openai
from tests.conftest import until
from tests.nanogpt.serving.conftest import FOREVER, Served, endless, small


def raw(served: Served, body: bytes, *, length: int | None = None) -> socket.socket:
    """A connection over which so much of a request has gone."""
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what is not read soon holds the server up
    connection.connect((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.parametrize("route", ["/v1/completions", "/predict", "/v2/models/gpt/infer"])
@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b'{"model": NaN}', "application/json", 400),
        (b"[]", "application/json", 400),
        (b"\xff", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"", "application/json", 400),
        (b"{}", "text/plain", 400),
        (json.dumps({"model": "gpt", "prompt": "a" * 10_000_000}).encode(), "application/json", 413),
    ],
    ids=["cut", "nan", "list", "bytes", "deep", "empty", "text", "10 MB"],
)
def test_a_bad_request_is_refused_in_the_form_of_its_dialect(
    body: bytes, kind: str, status: int, route: str, alphabet: Served
) -> None:
    answer = alphabet.http.post(route, content=body, headers={"Content-Type": kind})
    assert answer.status_code == status
    error = answer.json()["error"]
    message = error if route.startswith("/v2") else error["message"]
    assert message
    assert "\n" not in message
    assert "Traceback" not in answer.text
    if route.startswith("/v1"):
        assert error["type"] == "invalid_request_error"
    if route == "/predict":
        assert error["code"] == status


def test_a_path_that_is_not_there_and_a_method_that_is_not_taken(alphabet: Served) -> None:
    assert alphabet.http.get("/v1/nothing").json()["error"]["message"] == "there is nothing at /v1/nothing"
    answer = alphabet.http.get("/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_a_full_queue_is_answered_with_429_and_when_to_try_again() -> None:
    with small() as served, endless(served) as running, contextlib.ExitStack() as stack:
        pieces = running.iter_text()  # which is kept, for its end would be the answer's
        next(pieces)
        waiting = threading.Thread(target=lambda: stack.enter_context(endless(served)))
        waiting.start()
        until(lambda: served.metric("queue_length") == 1)
        answer = served.http.post("/v1/completions", json={"model": "gpt", "prompt": "a"})
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert served.http.post("/predict", json={"instances": ["a"]}).json()["error"]["status"] == "RESOURCE_EXHAUSTED"
        running.close()
        waiting.join()  # it has the slot now


def test_a_client_that_is_gone_frees_its_slot_whether_it_streamed_waited_or_queued() -> None:
    with small(queue=2) as served:
        with endless(served) as running:
            pieces = running.iter_text()  # which is kept, for its end would be the answer's
            next(pieces)
            whole = json.dumps({"model": "gpt", "prompt": "a", "max_tokens": FOREVER}).encode()
            queued = [raw(served, whole), raw(served, whole)]
            until(lambda: served.metric("queue_length") == 2)
            queued[0].close()
            until(lambda: served.metric("queue_length") == 1)
        until(lambda: served.metric("running_generations") == 1 and served.metric("queue_length") == 0)
        queued[1].close()
        until(served.idle)
        assert served.complete(prompt="a", max_tokens=1, temperature=0)["choices"][0]["text"] == "b"


def test_an_answer_that_nobody_reads_holds_no_slot() -> None:
    wanted = {"model": "gpt", "prompt": "a", "max_tokens": 1_000, "stream": True, "logprobs": 5}  # 700 kB
    with small() as served:
        unread = raw(served, json.dumps(wanted).encode())
        until(lambda: served.metric("generated_tokens_total") >= 1_000)
        assert served.complete(prompt="a", max_tokens=1, temperature=0)["choices"][0]["text"] == "b"
        unread.close()


def test_a_request_that_never_comes_whole_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "GRACE", 0.1)
    with small(seconds=0.1) as served, raw(served, b"{", length=100) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 503")


def test_only_who_has_the_token_may_use_the_model_and_anybody_may_look_whether_it_is_well() -> None:
    with small(token="secret") as served:
        for route in ("/v1/completions", "/predict", "/v2/models/gpt/infer"):
            for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
                answer = served.http.post(route, json={}, headers=given)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
                assert "bearer token" in answer.text
        assert served.http.get("/v1/models").status_code == 401
        assert served.http.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        for route in ("/", "/health", "/ready", "/metrics", "/v2/health/ready", "/openapi.json"):
            assert served.http.get(route).status_code == 200
        assert "secret" not in served.http.get("/openapi.json").text


def test_the_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = app.hmac.compare_digest
    monkeypatch.setattr(app.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    with small(token="secret") as served:
        served.http.get("/v1/models", headers={"Authorization": "Bearer guess"})
    assert compared == [(b"guess", b"secret")]


def test_a_model_that_fails_is_told_of_and_the_server_lives_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with small() as served:
        engine = served.service.scheduler._engine
        with monkeypatch.context() as patch:
            patch.setattr(engine, "step", lambda: 1 / 0)
            answer = served.http.post("/v1/completions", json={"model": "gpt", "prompt": "a"})
            assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
            assert served.http.get("/health").status_code == 503
            assert served.http.get("/v2/health/ready").json() == {"ready": False}
        assert "ZeroDivisionError" in capfd.readouterr().err
        assert served.complete(prompt="a", max_tokens=1, temperature=0)["choices"][0]["text"] == "b"
        assert served.http.get("/health").json() == {"status": "ok", "model": "gpt", "step": 7}


def test_nothing_of_the_page_comes_from_elsewhere(alphabet: Served) -> None:
    answer = alphabet.http.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    named = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
    assert {name for name in named if not name.startswith("data:")} == {"page/page.css", "page/page.js"}
    for name in ("page.css", "page.js"):
        asset = alphabet.http.get(f"/page/{name}")
        assert asset.status_code == 200
        assert "http" not in asset.text.replace("http-equiv", "")
    assert alphabet.http.get("/page/index.html").status_code == 404


def test_the_document_of_the_api_names_every_dialect_and_its_errors(alphabet: Served) -> None:
    document = alphabet.http.get("/openapi.json").json()
    assert {
        "/v1/completions",
        "/v1/models",
        "/predict",
        "/v2/models/{name}/infer",
        "/health",
        "/ready",
        "/metrics",
    } <= set(document["paths"])
    answers = document["paths"]["/v1/completions"]["post"]["responses"]
    assert {"200", "400", "404", "413", "429", "500", "503"} <= set(answers)
    schema = answers["400"]["content"]["application/json"]["schema"]
    assert schema["$ref"].endswith(openai.Error.__name__) or schema["$ref"].endswith("openai__Error")
