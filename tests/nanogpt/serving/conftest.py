"""Servers in the process of the tests, each on its own port, whose models recite the alphabet or random tokens."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
import torch
import uvicorn
from torch import nn

from model_zoo.nanogpt.model import GPT, GPTConfig
from model_zoo.nanogpt.serving.app import create_app
from model_zoo.nanogpt.serving.completions import Limits, Service
from model_zoo.nanogpt.serving.connections import Connection
from model_zoo.nanogpt.serving.metrics import Metrics
from model_zoo.nanogpt.serving.scheduler import Scheduler
from prepare.tokenizer import Bytes, Characters, Tokenizer
from tests.conftest import PATIENCE, until
from tests.nanogpt.test_generate import ALPHABET, reciter

FOREVER = 100_000_000


class Served:
    """A server that answers at `url`."""

    def __init__(self, url: str, service: Service, model: GPT) -> None:
        self.url, self.service, self.model = url, service, model
        self.http = httpx.Client(base_url=url, timeout=PATIENCE)

    def complete(self, **wanted: Any) -> Any:
        """The JSON of a completion."""
        answer = self.http.post("/v1/completions", json={"model": self.service.name} | wanted)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(f"elastic_gpt_{name}", labels) or 0.0

    def idle(self) -> bool:
        return not self.service.scheduler._open and not self.metric("running_generations")


def babbler(tokenizer: Tokenizer, seed: int = 0, block_size: int = 64) -> GPT:
    """A model with random weights and so unpredictable tokens."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(tokenizer.vocab_size, block_size, n_layer=2, n_head=2, n_embd=16)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


@contextlib.contextmanager
def serving(
    model: GPT, tokenizer: Tokenizer, *, step: int | None = 7, limits: Limits | None = None, **app: Any
) -> Iterator[Served]:
    limits, metrics = limits or Limits(), Metrics()
    scheduler = Scheduler(
        model, step, slots=limits.slots, queue=limits.queue, vocab_size=tokenizer.vocab_size, metrics=metrics
    )
    service = Service(
        scheduler,
        tokenizer,
        name="gpt",
        block_size=model.config.block_size,
        parameters=model.parameter_count(),
        limits=limits,
        metrics=metrics,
    )
    config = uvicorn.Config(
        create_app(service, **app), http=Connection, ws="none", log_config=None, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(
        socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
    )  # small buffers, so that an unread answer soon blocks
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    until(lambda: server.started)
    served = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", service, model)
    try:
        yield served
    finally:
        served.http.close()
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def small(**limits: Any) -> Iterator[Served]:
    """A server with one slot, whose answers have no end."""
    tokenizer = Characters(ALPHABET)
    given = {"slots": 1, "queue": 1, "tokens": FOREVER} | limits
    token = given.pop("token", None)
    with serving(
        reciter(tokenizer.encode(ALPHABET).tolist(), 27), tokenizer, limits=Limits(**given), token=token
    ) as one:
        yield one


def endless(served: Served, **more: Any) -> contextlib.AbstractContextManager[Any]:
    wanted = {"model": "gpt", "prompt": "a", "max_tokens": FOREVER, "stream": True} | more
    return served.http.stream("POST", "/v1/completions", json=wanted)


@pytest.fixture(scope="package")
def alphabet() -> Iterator[Served]:
    """A server whose model recites the alphabet, with a line break after z."""
    tokenizer = Characters(ALPHABET)
    limits = Limits(slots=4, queue=8, tokens=100_000)
    with serving(reciter(tokenizer.encode(ALPHABET).tolist(), tokenizer.vocab_size), tokenizer, limits=limits) as one:
        yield one


@pytest.fixture(scope="package")
def random_bytes() -> Iterator[Served]:
    """A server whose model draws random bytes."""
    with serving(babbler(Bytes()), Bytes()) as one:
        yield one
