"""A connection that says nothing, or too little, is closed; one whose request is being answered is not."""

import json
import socket
from collections.abc import Iterator

import pytest

from model_zoo.nanogpt.serving import connections
from model_zoo.nanogpt.serving.completions import Limits
from prepare.tokenizer import Characters
from tests.conftest import PATIENCE, until
from tests.nanogpt.serving.conftest import Served, serving
from tests.nanogpt.test_generate import ALPHABET, reciter


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    tokenizer = Characters(ALPHABET)
    model = reciter(tokenizer.encode(ALPHABET).tolist(), 27)
    with serving(model, tokenizer, limits=Limits(slots=1, tokens=100_000_000)) as one:
        yield one


def connect(served: Served) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


@pytest.mark.parametrize("said", [b"", b"GET /health HT"], ids=["nothing", "half a head"])
def test_a_connection_over_which_no_request_comes_is_closed(said: bytes, served: Served) -> None:
    with connect(served) as connection:
        connection.sendall(said)
        assert connection.recv(100) == b""


def test_half_a_head_after_an_answer_is_closed_too(served: Served) -> None:
    with connect(served) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
        heard = b""
        while b'"status"' not in heard:
            heard += connection.recv(1000)
        connection.sendall(b"GET /hea")
        assert connection.recv(100) == b""


def test_an_answer_that_takes_longer_is_not_cut_and_two_hundred_idle_ones_hold_nobody_up(served: Served) -> None:
    idle = [connect(served) for _ in range(200)]
    body = json.dumps({"model": "gpt", "prompt": "a", "max_tokens": 100_000_000, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    with connect(served) as connection:
        connection.sendall(head.encode() + b"\r\n" + body)
        assert connection.recv(100)
        for one in idle:  # which takes the time after which the answer would be cut
            assert one.recv(1) == b""
            one.close()
        read = 0
        while read < 100_000:
            read += len(more := connection.recv(10_000))
            assert more
    until(served.idle)
