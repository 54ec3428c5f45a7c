"""Text in, text out: from prompts to generations, and from their tokens to text. All dialects are built on it."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from model_zoo.nanogpt.engine import Request, Token
from model_zoo.nanogpt.serving.metrics import Metrics
from model_zoo.nanogpt.serving.refusal import Refusal
from model_zoo.nanogpt.serving.scheduler import Answer, Scheduler
from model_zoo.nanogpt.text import TextStream, prompt_ids
from prepare.tokenizer import Tokenizer

MOST_BYTES = 1 << 20
"""Largest body of a request, many times the longest prompt."""


@dataclass(frozen=True)
class Limits:
    """Limits of one request, and of all together."""

    slots: int = 16
    """Most generations that run at a time."""
    queue: int = 64
    """Most generations that wait for a slot."""
    tokens: int = 4096
    """Most new tokens of one generation."""
    seconds: float = 300
    """Longest time from a request to the end of its answer."""


@dataclass(frozen=True)
class Options:
    """How to generate (see `Request`), and where to stop."""

    max_new_tokens: int
    temperature: float
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stops: Sequence[str] = ()
    logprobs: int | None = None

    def numbered(self, place: int) -> "Options":
        """Options of the generation at `place` in a request: `place` is added to its seed, so that answers differ."""
        return self if self.seed is None else replace(self, seed=(self.seed + place) % 2**64)


@dataclass(frozen=True)
class Wanted:
    """One generation of a request."""

    ids: list[int]
    options: Options
    offset: int = 0
    """Characters of the answer before the generated text: those of the prompt, if it is repeated."""


@dataclass(frozen=True)
class Part:
    """One token as clients see it."""

    text: str
    """Its text; `bytes:` and escapes if it is not whole characters."""
    offset: int
    """Characters of the answer before it."""
    logprob: float | None
    likeliest: dict[str, float]


@dataclass(frozen=True)
class Piece:
    """A piece of text of one generation that is certain."""

    text: str
    parts: list[Part]
    finished: Literal["stop", "length"] | None
    step: int | None
    """Step of the model that drew its last token."""


@dataclass
class Text:
    """The whole text of one generation."""

    text: str = ""
    parts: list[Part] = field(default_factory=list)
    finished: Literal["stop", "length"] = "length"
    step: int | None = None
    tokens: int = 0
    """Number of tokens drawn, including those of a stop."""


class Completion:
    """One generation that is running or waiting. Its owner has to close it."""

    def __init__(self, service: "Service", answer: Answer | None, wanted: Wanted) -> None:
        self._service, self._answer, self._wanted = service, answer, wanted
        self.tokens = 0
        """Number of tokens drawn so far."""

    def close(self) -> None:
        """Free its cache slot, if it has one yet."""
        if self._answer:
            self._service.scheduler.cancel(self._answer)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yields its text as it becomes certain. The last piece has `finished`. Raises Refusal."""
        if self._answer is None:  # no token was asked for
            yield Piece("", [], "length", self._service.scheduler.step)
            return
        before = self._wanted.offset
        stream = TextStream(self._service.tokenizer, self._wanted.options.stops)
        parts: list[Part] = []
        drawn, last = self._answer.tokens(), self._answer.since
        while True:
            try:
                async with asyncio.timeout(self._answer.since + self._service.limits.seconds - time.monotonic()):
                    token, step = await anext(drawn)
            except TimeoutError as error:
                self.close()
                raise Refusal(
                    503, f"the answer took more than {self._service.limits.seconds:g} s: ask for fewer tokens"
                ) from error
            now = time.monotonic()
            metrics = self._service.metrics
            (metrics.token_seconds if self.tokens else metrics.first_token_seconds).observe(now - last)
            last = now
            self.tokens += 1
            if token.finished == "stop":  # the end-of-text token, which has no text
                yield Piece(stream.finish(), parts, "stop", step)
                return
            offset = stream.length
            text = stream.push(token.id)
            parts.append(self._service.part(token, before + offset))
            if stream.stopped:
                self.close()
                parts = [part for part in parts if part.offset - before < stream.length]
                yield Piece(text, parts, "stop", step)
                return
            if token.finished:
                yield Piece(text + stream.finish(), parts, "length", step)
                return
            if text:
                yield Piece(text, parts, None, step)
                parts = []

    async def whole(self) -> Text:
        """Wait for the whole text. Raises Refusal."""
        found = Text()
        async for piece in self.pieces():
            found.text += piece.text
            found.parts += piece.parts
            found.finished, found.step = piece.finished or found.finished, piece.step
        found.tokens = self.tokens
        return found


class Service:
    """A model that answers prompts.

    Args:
        name: what clients call the model.
        parameters: its number of parameters.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        *,
        name: str,
        block_size: int,
        parameters: int,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self.scheduler, self.tokenizer, self.limits, self.metrics = scheduler, tokenizer, limits, metrics
        self.name, self.block_size, self.parameters = name, block_size, parameters
        self.created = int(time.time())
        self.usual_tokens = min(256, limits.tokens)
        """New tokens if a request does not say how many, in dialects that leave it to the server."""

    async def encode(self, prompt: str | Sequence[int], param: str = "prompt") -> list[int]:
        """The ids of a prompt. Raises Refusal that names `param` if the model cannot take them."""
        if isinstance(prompt, str):
            try:  # in a thread, since a long prompt would block all others
                ids = await asyncio.to_thread(prompt_ids, prompt, self.tokenizer)
            except ValueError as error:
                raise Refusal(400, str(error), param=param) from error
        else:
            ids = list(prompt)
        for id_ in ids:
            if not 0 <= id_ < self.tokenizer.vocab_size:
                raise Refusal(400, f"token id {id_} is not one of 0 to {self.tokenizer.vocab_size - 1}", param=param)
        if len(ids) > self.block_size:
            raise Refusal(
                400,
                f"the prompt has {len(ids)} tokens, this model's context {self.block_size}: shorten it",
                param=param,
                code="context_length_exceeded",
            )
        return ids

    def start(self, wanted: Sequence[Wanted]) -> list[Completion]:
        """Start all of these generations or none. Raises Refusal."""
        for one in wanted:
            if one.options.max_new_tokens > self.limits.tokens:
                raise Refusal(
                    400, f"{one.options.max_new_tokens} new tokens are more than the {self.limits.tokens} allowed here"
                )
        if len(wanted) > self.scheduler.most:
            raise Refusal(
                400, f"{len(wanted)} generations a request are more than the {self.scheduler.most} allowed here"
            )
        drawn = [one for one in wanted if one.options.max_new_tokens]
        answers = iter(self.scheduler.submit([self._request(one) for one in drawn]))
        return [Completion(self, next(answers) if one.options.max_new_tokens else None, one) for one in wanted]

    def _request(self, wanted: Wanted) -> Request:
        options, eot_id = wanted.options, self.tokenizer.eot_id
        return Request(
            wanted.ids,
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            stop_ids=[] if eot_id is None else [eot_id],
            logprobs=options.logprobs,
        )

    def part(self, token: Token, offset: int) -> Part:
        likeliest = {self.word(id_): logprob for id_, logprob in token.likeliest}
        return Part(self.word(token.id), offset, token.logprob, likeliest)

    def word(self, id_: int) -> str:
        """The text of one id, or its bytes if they alone are not text."""
        data = self.tokenizer.decode_bytes([id_])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


async def wholes(completions: Sequence[Completion]) -> list[Text]:
    """Wait for the whole texts of all, and close them. Raises Refusal."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(completion.whole()) for completion in completions]
        return [task.result() for task in tasks]
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        for completion in completions:
            completion.close()
