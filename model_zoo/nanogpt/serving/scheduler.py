"""One engine for all requests: a thread that draws tokens, and the event loop's side of it.

Only the thread uses engine and model. It gets orders from others, which it carries out between two
tokens. A generation does not wait for a slow reader: its tokens (no more than it asked for) wait in
memory, and its cache slot is free.
"""

import asyncio
import math
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

from model_zoo.nanogpt.engine import Engine, Generation, Request, Token
from model_zoo.nanogpt.model import GPT
from model_zoo.nanogpt.serving.metrics import Metrics
from model_zoo.nanogpt.serving.refusal import Refusal

BROKEN = "the model failed: the server's log says why"


class Answer:
    """The tokens of one request, for one reader. Made by `Scheduler.submit`."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.generation: Generation | None = None
        self.drawn: asyncio.Queue[tuple[Token, int | None] | None] = asyncio.Queue()
        self.since = time.monotonic()

    async def tokens(self) -> AsyncIterator[tuple[Token, int | None]]:
        """Each token and the step of the model that drew it; the last one has `finished`. Raises Refusal."""
        while drawn := await self.drawn.get():
            yield drawn
            if drawn[0].finished:
                return
        raise Refusal(500, BROKEN)


class Scheduler:
    """Shares a model's cache slots among requests.

    Args:
        step: step of the model; None if not known.
        slots: most generations that run at a time.
        queue: most generations that wait for a slot.
        vocab_size: number of ids of the tokenizer, see `Engine`.
    """

    def __init__(
        self, model: GPT, step: int | None, *, slots: int, queue: int, vocab_size: int, metrics: Metrics
    ) -> None:
        self.step = step
        """Step of the model that draws the next token."""
        self.failed = False
        """Whether the last forward pass failed."""
        self.most = slots + queue
        """Most generations that run or wait at a time."""
        self._engine, self._slots, self._metrics = Engine(model, slots, vocab_size), slots, metrics
        self._open: set[Answer] = set()  # of the event loop: submitted and not over
        self._answers: dict[Generation, Answer] = {}  # of the thread
        self._orders: list[Callable[[], None] | None] = []
        self._wake = threading.Condition()
        self._seconds = 1.0  # time of a generation, mean of the last ones
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._tell_step(step)

    def start(self) -> None:
        """Start the thread. Call it in the event loop of the readers."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current forward pass."""
        self._order(None)
        self._thread.join()

    def submit(self, requests: Sequence[Request]) -> list[Answer]:
        """Generate all requests. Raises Refusal, and takes none, if there is no room for all."""
        if len(self._open) + len(requests) > self.most:
            seconds = math.ceil(self._seconds * len(self._open) / self._slots)
            raise Refusal(
                429,
                f"{len(self._open)} generations are running or waiting here, at most {self.most} may: try again later",
                code="rate_limit_exceeded",
                retry_after=min(max(1, seconds), 60),
            )
        answers = [Answer(request) for request in requests]
        self._open.update(answers)
        for answer in answers:
            self._metrics.prompt_tokens.inc(len(answer.request.tokens))
            self._order(lambda answer=answer: self._add(answer))  # type: ignore[misc]
        return answers

    def cancel(self, answer: Answer) -> None:
        """Stop an answer that is not read any more, and free its slot."""
        if answer in self._open:
            self._open.remove(answer)
            self._order(lambda: self._drop(answer))

    async def score(self, tokens: Sequence[int], likeliest: int) -> list[Token]:
        """See `Engine.score`. Raises Refusal."""
        found: asyncio.Future[list[Token] | None] = self._loop.create_future()

        def order() -> None:
            scored = None
            try:
                scored = self._engine.score(tokens, likeliest)
            except Exception as error:  # the reader waits, so it must get any error
                self._tell(error)
            self._loop.call_soon_threadsafe(lambda: None if found.done() else found.set_result(scored))

        self._order(order)
        if (scored := await found) is None:
            raise Refusal(500, BROKEN)
        return scored

    def replace(self, model: GPT, step: int) -> None:
        """Use newer weights from the next token on. No request is lost."""

        def order() -> None:
            self._engine.replace(model)
            self._tell_step(step)

        self._order(order)

    def _order(self, order: Callable[[], None] | None) -> None:
        with self._wake:
            self._orders.append(order)
            self._wake.notify()

    # --- in the thread

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._orders or self._answers)
                orders, self._orders = self._orders, []
            for order in orders:
                if order is None:
                    return
                order()
            if self._answers:
                self._draw()
            self._metrics.running.set(len(self._engine.running))
            self._metrics.queue.set(len(self._engine.waiting))

    def _draw(self) -> None:
        try:
            drawn = self._engine.step()
        except Exception as error:  # any error of torch: all readers get it, and the next requests may work
            self._tell(error)
            for generation in list(self._answers):
                self._engine.drop(generation)
            lost, self._answers = list(self._answers.values()), {}
            self._loop.call_soon_threadsafe(self._lose, lost)
            return
        self.failed = False
        self._metrics.batch_size.observe(len(drawn))
        self._metrics.generated_tokens.inc(len(drawn))
        answers = [(self._answers[generation], token, self.step) for generation, token in drawn]
        for generation, token in drawn:
            if token.finished:
                del self._answers[generation]
        self._loop.call_soon_threadsafe(self._deliver, answers)

    def _add(self, answer: Answer) -> None:
        answer.generation = self._engine.add(answer.request)
        self._answers[answer.generation] = answer

    def _drop(self, answer: Answer) -> None:
        if answer.generation in self._answers:
            del self._answers[answer.generation]
            self._engine.drop(answer.generation)

    def _tell(self, error: Exception) -> None:
        self.failed = True
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    def _tell_step(self, step: int | None) -> None:
        self.step = step
        self._metrics.model_step.set(math.nan if step is None else step)

    # --- in the loop

    def _deliver(self, drawn: list[tuple[Answer, Token, int | None]]) -> None:
        for answer, token, step in drawn:
            answer.drawn.put_nowait((token, step))
            if token.finished and answer in self._open:
                self._open.remove(answer)
                self._seconds += 0.1 * (time.monotonic() - answer.since - self._seconds)

    def _lose(self, answers: list[Answer]) -> None:
        for answer in answers:
            self._open.discard(answer)
            answer.drawn.put_nowait(None)
