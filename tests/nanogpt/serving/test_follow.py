"""follow.py: newer checkpoints of a run are taken over, and no request is lost."""

import asyncio
import functools
import gc
import itertools
import json
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_gpt.checkpoint import Checkpoints
from model_zoo.nanogpt.model import GPT, GPTConfig
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

    until(lambda: heard("step 8: a broken model"))
    assert greedy(served) == ("n", "step-7")
    save(run, 9, backwards())
    until(lambda: greedy(served) == ("l", "step-9"))
    assert not heard("never")
    assert told.count("step 8: a broken model") == 1


def test_a_checkpoint_that_is_bad_is_read_again_only_when_it_changes(
    served: Served, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, looks = list[int](), list[None]()
    read, steps = Checkpoints.read, Checkpoints.steps
    monkeypatch.setattr(Checkpoints, "read", lambda of, step, part: reads.append(step) or read(of, step, part))
    monkeypatch.setattr(Checkpoints, "steps", lambda of: looks.append(None) or steps(of))

    def seen() -> None:
        before = len(looks)
        until(lambda: len(looks) > before + 5)

    save(run, 8, backwards())
    until(lambda: greedy(served) == ("l", "step-8"))
    save(run, 9, reciter(FORWARDS, 27))
    weights = run / "checkpoints" / Checkpoints.name(9) / "model.safetensors"
    good = weights.read_bytes()
    until(lambda: greedy(served) == ("n", "step-9"))
    save(run, 10, backwards())
    until(lambda: 10 in reads)
    bad = run / "checkpoints" / Checkpoints.name(11)
    shutil.copytree(weights.parent, bad)
    (bad / "model.safetensors").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    until(lambda: 11 in reads)
    until(lambda: greedy(served) == ("l", "step-10"))
    seen()
    once = reads.count(11)
    assert once <= 2  # as it was copied, and as it was then
    seen()
    assert reads.count(11) == once
    (bad / "model.safetensors").write_bytes(good)  # somebody has put it right
    until(lambda: greedy(served) == ("n", "step-11"))


def test_a_run_that_went_back_is_followed_back(served: Served, run: Path) -> None:
    save(run, 9, backwards())
    until(lambda: greedy(served) == ("l", "step-9"))
    shutil.rmtree(run / "checkpoints" / "step_00000009")
    until(lambda: greedy(served)[1] != "step-9")
    assert greedy(served) == ("n", "step-7")


@functools.cache
def another(step: int, width: int = 16) -> GPT:
    """The model of `step`, unlike that of any other."""
    torch.manual_seed(step)
    model = GPT(GPTConfig(TOKENIZER.vocab_size, block_size=64, n_layer=2, n_head=2, n_embd=width)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def attack(run: Path, served: Served, drawn: list[Any]) -> set[int]:
    """Save checkpoints, each good one harmed once it is taken and followed by bad ones, while clients draw; the good ones."""

    def cut(folder: Path) -> None:
        with (folder / "model.safetensors").open("r+b") as file:  # the very file, which a server may have mapped
            file.truncate(1000)

    def no_manifest(folder: Path) -> None:
        (folder / "MANIFEST.json").unlink()

    def taken_away(_folder: Path) -> None:
        run.rename(run.with_name("elsewhere"))
        time.sleep(0.1)
        run.with_name("elsewhere").rename(run)

    good = {7}
    for turn, harm in enumerate((cut, no_manifest, shutil.rmtree, taken_away, cut)):
        step, before = 10 * turn + 10, len(drawn)
        save(run, step, another(step))
        until(lambda step=step: served.service.scheduler.step == step)  # type: ignore[misc]
        good.add(step)
        harm(run / "checkpoints" / f"step_{step:08d}")
        save(run, step + 1, another(step + 1, width=32))  # of another shape
        if turn % 2:
            (run / "checkpoints" / f"step_{step + 1:08d}" / "MANIFEST.json").write_text("[]")
        save(run, step + 2, another(step + 2))
        shutil.rmtree(run / "checkpoints" / f"step_{step + 2:08d}")  # taken or not, or in the middle of that
        good.add(step + 2)
        until(lambda before=before: len(drawn) > before + 8)  # type: ignore[misc]
    save(run, 100, another(100))
    return good | {100}


def test_clients_that_stream_while_checkpoints_come_and_break_get_each_token_from_the_step_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.02)
    run = write_run(tmp_path / "run", TOKENIZER, another(7))
    taken: list[weakref.ref[GPT]] = []
    answers: list[tuple[int, list[tuple[int, str]]]] = []
    over = threading.Event()

    async def client(number: int) -> None:
        for seed in itertools.count(1000 * number):
            answers.append((seed, await ask(served, seed)))
            if over.is_set():
                return

    async def clients() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(32):
                group.create_task(client(number))

    async def background() -> None:
        scheduler, replace = served.service.scheduler, served.service.scheduler.replace

        def recorded(model: GPT, step: int) -> None:
            taken.append(weakref.ref(model))
            replace(model, step)

        monkeypatch.setattr(scheduler, "replace", recorded)
        await follow.follow(run / "checkpoints", served.model.config, torch.device("cpu"), scheduler)

    with serving(another(7), TOKENIZER, limits=Limits(slots=16, queue=32)) as served:
        following = asyncio.run_coroutine_threadsafe(background(), served.service.scheduler._loop)
        with ThreadPoolExecutor(1) as thread:
            asking = thread.submit(asyncio.run, clients())
            try:
                good = attack(run, served, answers)
            finally:
                over.set()
            asking.result()  # raises what a client met
        until(lambda: served.service.scheduler.step == 100)
        last = served.complete(prompt=PROMPT, max_tokens=50, seed=5)
        following.cancel()
        gc.collect()
        assert sum(model() is not None for model in taken) == 1  # the earlier ones are free
    assert last["system_fingerprint"] == "step-100"
    assert {step for _, drawn in answers for step, _ in drawn} <= good
    assert sum(len({step for step, _ in drawn}) > 1 for _, drawn in answers) > 5  # weights changed in the middle
    for seed, drawn in answers:
        check(seed, drawn)


async def ask(served: Served, seed: int) -> list[tuple[int, str]]:
    """Stream an answer: its pieces, each with its step."""
    body = json.dumps({"model": "gpt", "prompt": PROMPT, "max_tokens": 50, "seed": seed, "stream": True})
    host, port = served.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    lines = [line.strip() async for line in reader if line.startswith(b"data: ")]
    writer.close()
    assert lines.pop() == b"data: [DONE]", lines
    events = [json.loads(line.removeprefix(b"data: ")) for line in lines]
    return [(int(event["system_fingerprint"].removeprefix("step-")), event["choices"][0]["text"]) for event in events]


PROMPT = "hello"


def check(seed: int, drawn: list[tuple[int, str]]) -> None:
    """Assert that each token of an answer is the one that the model of its step draws, computed without engine and cache."""
    ids = TOKENIZER.encode(PROMPT + "".join(text for _, text in drawn)).tolist()
    begin, generator = len(ids) - len(drawn), torch.Generator().manual_seed(seed)
    assert begin == len(PROMPT)
    assert len(drawn) == 50
    with torch.no_grad():
        logits = {step: another(step)(torch.tensor([ids]))[0] for step in {step for step, _ in drawn}}
    for place, (step, _) in enumerate(drawn, begin):
        clocks = torch.empty(TOKENIZER.vocab_size).exponential_(generator=generator)
        first = logits[step][place - 1].softmax(-1) / clocks  # as in sampling.py
        assert first[ids[place]] > 0.999 * first.max(), (seed, place, step)  # up to float sums


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
