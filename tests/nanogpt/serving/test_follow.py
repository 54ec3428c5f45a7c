"""follow.py: newer checkpoints of a run are taken over, and no request is lost."""

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_gpt.checkpoint import Checkpoints
from model_zoo.nanogpt.model import GPT
from model_zoo.nanogpt.serving import follow
from model_zoo.nanogpt.serving.completions import Limits
from prepare.tokenizer import Characters
from tests.conftest import until
from tests.nanogpt.serving.conftest import Served, serving
from tests.nanogpt.serving.test_serve import serve
from tests.nanogpt.test_generate import ALPHABET, reciter, write_run

TOKENIZER = Characters(ALPHABET)
FORWARDS = TOKENIZER.encode(ALPHABET).tolist()


def backwards() -> GPT:
    return reciter(FORWARDS[::-1], 27)


def save(run: Path, step: int, model: GPT) -> None:
    checkpoints = Checkpoints(run / "checkpoints", keep=2)
    checkpoints.save(step, {f"model.{name}": tensor for name, tensor in model.state_dict().items()}, [])
    assert checkpoints.finished(wait=True) == step


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", TOKENIZER, reciter(FORWARDS, 27))


@pytest.fixture
def served(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.02)
    model = reciter(FORWARDS, 27)

    async def background() -> None:
        while not scheduler:
            await asyncio.sleep(0.01)
        await follow.follow(run / "checkpoints", model.config, torch.device("cpu"), scheduler[0])

    scheduler: list[Any] = []
    with serving(model, TOKENIZER, limits=Limits(tokens=100_000_000), background=background) as one:
        scheduler.append(one.service.scheduler)
        yield one


def greedy(served: Served) -> tuple[str, str]:
    answer = served.complete(prompt="m", max_tokens=1, temperature=0)
    return answer["choices"][0]["text"], answer["system_fingerprint"]


def test_a_newer_checkpoint_is_taken_in_the_middle_of_an_answer_and_each_piece_tells_its_step(
    served: Served, run: Path
) -> None:
    wanted = {"model": "gpt", "prompt": "a", "max_tokens": 100_000_000, "temperature": 0, "stream": True}
    seen: dict[str, str] = {}
    with served.http.stream("POST", "/v1/completions", json=wanted) as answer:
        for line in answer.iter_lines():
            if line:
                event = json.loads(line.removeprefix("data: "))
                step = event["system_fingerprint"]
                seen[step] = seen.get(step, "") + event["choices"][0]["text"]
                if list(seen) == ["step-7"] and len(seen["step-7"]) == 40:
                    threading.Thread(target=save, args=(run, 9, backwards())).start()
                if len(seen.get("step-9", "")) > 40:
                    break
    assert list(seen) == ["step-7", "step-9"]
    assert (ALPHABET * 1000).startswith("a" + seen["step-7"][:1000])
    last = seen["step-7"][-1]
    assert ((ALPHABET[::-1] * 4).partition(last)[2]).startswith(seen["step-9"][:40])
    assert greedy(served) == ("l", "step-9")
    assert served.metric("model_step") == 9
    assert served.http.get("/ready").json()["step"] == 9


def test_a_damaged_or_broken_checkpoint_is_told_of_once_and_not_taken(
    served: Served, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = backwards()
    with torch.no_grad():
        broken.wte.weight[0, 0] = float("nan")
    save(run, 8, broken)
    told = ""

    def heard(words: str) -> bool:
        nonlocal told
        told += capfd.readouterr().err
        return words in told

    until(lambda: heard("step 8 is of a broken model"))
    assert greedy(served) == ("n", "step-7")
    save(run, 9, backwards())
    until(lambda: greedy(served) == ("l", "step-9"))
    assert not heard("never")
    assert told.count("step 8 is of a broken model") == 1


def test_a_run_that_went_back_is_followed_back(served: Served, run: Path) -> None:
    save(run, 9, backwards())
    until(lambda: greedy(served) == ("l", "step-9"))
    shutil.rmtree(run / "checkpoints" / "step_00000009")
    until(lambda: greedy(served)[1] != "step-9")
    assert greedy(served) == ("n", "step-7")


def test_the_command_waits_for_the_first_checkpoint_and_takes_the_next(run: Path) -> None:
    first = run / "checkpoints" / "step_00000007"
    first.rename(run / "later")
    with serve(run, "--follow", wait=False) as server:
        until(lambda: "waiting for the first checkpoint (no checkpoint in" in server.log)
        (run / "later").rename(first)
        server.wait()
        assert server.complete(prompt="m", max_tokens=1)["choices"][0]["text"] == "n"
        save(run, 9, backwards())
        until(lambda: server.complete(prompt="m", max_tokens=1)["choices"][0]["text"] == "l")
        assert "model of step 9" in server.log
