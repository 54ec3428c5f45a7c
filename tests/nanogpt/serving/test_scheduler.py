"""scheduler.py: each answer is what its request gets alone, and cancelled answers draw no more tokens."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from model_zoo.nanogpt.engine import Request, generate
from model_zoo.nanogpt.serving.metrics import Metrics
from model_zoo.nanogpt.serving.refusal import Refusal
from model_zoo.nanogpt.serving.scheduler import Answer, Scheduler
from prepare.tokenizer import Bytes
from tests.nanogpt.serving.conftest import babbler

MODEL, NEWER = babbler(Bytes()), babbler(Bytes(), seed=1)


def request(number: int, tokens: int = 10) -> Request:
    return Request([number % 256], tokens, seed=number)


async def ids(answer: Answer) -> list[int]:
    return [token.id async for token, _ in answer.tokens()]


def run(talk: Callable[[Scheduler], Awaitable[None]], *, slots: int = 3, queue: int = 50) -> Metrics:
    metrics = Metrics()

    async def with_scheduler() -> None:
        scheduler = Scheduler(MODEL, 1, slots=slots, queue=queue, vocab_size=256, metrics=metrics)
        scheduler.start()
        try:
            await talk(scheduler)
        finally:
            scheduler.stop()

    asyncio.run(with_scheduler())
    return metrics


def test_requests_of_many_lengths_at_once_get_what_each_gets_alone() -> None:
    async def talk(scheduler: Scheduler) -> None:
        requests = [request(number, 1 + number % 13) for number in range(20)]
        answers = scheduler.submit(requests)
        found = await asyncio.gather(*map(ids, answers))
        assert found == [list(generate(MODEL, one, 256)) for one in requests]

    run(talk)


def test_what_does_not_fit_is_refused_whole_and_there_is_room_again_afterwards() -> None:
    async def talk(scheduler: Scheduler) -> None:
        first = scheduler.submit([request(1), request(2)])
        with pytest.raises(Refusal) as caught:
            scheduler.submit([request(3), request(4)])
        assert caught.value.status == 429
        assert 1 <= int(caught.value.headers()["Retry-After"]) <= 60
        [third] = scheduler.submit([request(3)])  # for none of the two was taken
        for answer in (*first, third):
            await ids(answer)
        scheduler.submit([request(number) for number in range(3)])

    run(talk, slots=1, queue=2)


def test_a_cancelled_answer_makes_room_at_once_and_draws_no_more() -> None:
    async def talk(scheduler: Scheduler) -> None:
        running, waiting = scheduler.submit([request(1, 10**9), request(2, 10**9)])
        await anext(running.tokens())
        scheduler.cancel(waiting)
        scheduler.cancel(running)
        scheduler.cancel(running)  # once more does no harm
        assert await ids(scheduler.submit([request(3), request(4)])[1]) == list(generate(MODEL, request(4), 256))

    metrics = run(talk, slots=1, queue=1)
    assert metrics.registry.get_sample_value("elastic_gpt_running_generations") == 0


def test_newer_weights_come_between_two_tokens_and_each_token_tells_its_step() -> None:
    async def talk(scheduler: Scheduler) -> None:
        [answer] = scheduler.submit([Request([5], 10**6, temperature=0)])
        drawn = []
        async for token, step in answer.tokens():
            drawn.append((token.id, step))
            if len(drawn) == 5:
                scheduler.replace(NEWER, 2)
            if [step for _, step in drawn[-10:]] == [2] * 10:
                break
        scheduler.cancel(answer)
        steps = [step for _, step in drawn]
        assert steps == sorted(steps)
        assert set(steps) == {1, 2}
        before = [id_ for id_, step in drawn if step == 1]
        after = [id_ for id_, step in drawn if step == 2]
        assert before == list(generate(MODEL, Request([5], len(before), temperature=0), 256))
        rest = Request([5, *before], len(after), temperature=0)
        assert after == list(generate(NEWER, rest, 256))

    run(talk)


def test_a_failure_reaches_every_reader_and_the_next_request_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk(scheduler: Scheduler) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(scheduler._engine, "step", lambda: 1 / 0)
            for answer in scheduler.submit([request(1), request(2)]):
                with pytest.raises(Refusal, match="the model failed"):
                    await ids(answer)
            assert scheduler.failed
            patch.setattr(scheduler._engine, "score", lambda *_: 1 / 0)
            with pytest.raises(Refusal, match="the model failed"):
                await scheduler.score([1, 2], 1)
        assert await ids(scheduler.submit([request(3)])[0]) == list(generate(MODEL, request(3), 256))
        assert not scheduler.failed

    run(talk)
