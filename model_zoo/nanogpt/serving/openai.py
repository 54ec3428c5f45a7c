"""OpenAI's dialect: /v1/completions and /v1/models, as its clients speak it.

Parameters that the real API does not have are refused, as there. Those that this model cannot
follow (`suffix`, `logit_bias`, penalties) are refused too, unless they have no effect.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from model_zoo.nanogpt.serving.completions import MOST_BYTES, Completion, Options, Part, Service, Text, Wanted, wholes
from model_zoo.nanogpt.serving.refusal import Refusal

MOST_PROMPTS = 128
SEED = 2**53  # some JSON readers round larger numbers


def _without_point(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_without_point)
"""A whole number, 1.0 as well: to JSON, and to JSON Schema, that is the same number."""
Ids = Annotated[list[Annotated[int, Field(ge=0), WHOLE]], Field(min_length=1)]
Prompts = Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
IdPrompts = Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
Stop = Annotated[str, Field(min_length=1)]
Logprobs = dict[str, list[Any]]


class Strict(BaseModel):
    """Refuses unknown fields, "1" for 1, and half a character (a lone surrogate), which no answer could repeat."""

    # pydantic takes any Python string that it need not look into. A limit makes it look, and no body has longer ones.
    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="null", str_max_length=MOST_BYTES
    )


class StreamOptions(Strict):
    include_usage: bool | None = False


class CompletionRequest(Strict):
    """A request for a completion; see https://platform.openai.com/docs/api-reference/completions."""

    model: str
    prompt: str | Prompts | Ids | IdPrompts | None = None
    max_tokens: Annotated[int, Field(ge=0), WHOLE] | None = 16
    temperature: float | None = Field(default=1.0, ge=0, le=2)
    top_p: float | None = Field(default=1.0, ge=0, le=1)
    n: Annotated[int, Field(ge=1, le=128), WHOLE] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=5), WHOLE] | None = None
    echo: bool | None = False
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-SEED, lt=SEED), WHOLE] | None = None
    user: str | None = None
    best_of: Annotated[int, Field(ge=1, le=20), WHOLE] | None = None
    suffix: str | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=0.0, ge=-2, le=2)


class Model(BaseModel):
    """A model. This server adds its number of updates, parameters, and context length."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "elastic-gpt"
    step: int | None
    parameters: int
    context: int


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(BaseModel):
    text: str
    index: int
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionAnswer(BaseModel):
    """A whole answer, or one event of a stream. `system_fingerprint` has the step of the model."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[Choice]
    usage: Usage | None = None


class ErrorFields(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorFields


def error(refusal: Refusal) -> dict[str, Any]:
    """A refusal in the form that OpenAI's clients read."""
    kinds = {401: "invalid_request_error", 429: "rate_limit_error"}
    kind = kinds.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error")
    code = "invalid_api_key" if refusal.status == 401 else refusal.code
    return Error(error=ErrorFields(message=refusal.message, type=kind, param=refusal.param, code=code)).model_dump()


class EventStream(StreamingResponse):
    """Server-sent events. When the connection closes, their source is closed."""

    def __init__(self, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.events.aclose()  # type: ignore[attr-defined]  # it is a generator


def router(service: Service, dependencies: Sequence[Any], responses: Mapping[int | str, dict[str, Any]]) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["OpenAI"], dependencies=list(dependencies), responses=dict(responses))

    def model() -> Model:
        return Model(
            id=service.name,
            created=service.created,
            step=service.scheduler.step,
            parameters=service.parameters,
            context=service.block_size,
        )

    @routes.get("/models")
    async def models() -> Models:
        return Models(data=[model()])

    @routes.get("/models/{name:path}", responses={404: {"model": Error}})
    async def one_model(name: str) -> Model:
        _check_model(name, service)
        return model()

    @routes.post("/completions", response_model=CompletionAnswer, responses={404: {"model": Error}})
    async def completions(wanted: CompletionRequest) -> Response:
        _check_model(wanted.model, service)
        _refuse_what_has_no_effect_here(wanted)
        asked = await _Asked.of(wanted, service)
        if wanted.stream:
            return EventStream(asked.events())
        answer = await asked.answer()
        return JSONResponse(answer.model_dump())

    return routes


def _check_model(name: str, service: Service) -> None:
    if name != service.name:
        raise Refusal(
            404, f"the model {name!r} does not exist: here is {service.name!r}", param="model", code="model_not_found"
        )


def _refuse_what_has_no_effect_here(wanted: CompletionRequest) -> None:
    for name in ("suffix", "logit_bias", "presence_penalty", "frequency_penalty"):
        if getattr(wanted, name):
            raise Refusal(400, f"{name} is not supported by this model: leave it out", param=name)
    n = wanted.n or 1
    if wanted.best_of is not None and wanted.best_of < n:
        raise Refusal(400, f"best_of is {wanted.best_of}, less than n, which is {n}: give at least n", param="best_of")
    if wanted.stream and wanted.best_of is not None and wanted.best_of > n:
        raise Refusal(400, "best_of cannot be streamed: which is best is known at the end", param="best_of")
    if wanted.stream_options and not wanted.stream:
        raise Refusal(400, "stream_options is for stream: true", param="stream_options")


class _Asked:
    """A request that is being answered."""

    def __init__(
        self, wanted: CompletionRequest, service: Service, prompts: list[list[int]], echoes: list[Text]
    ) -> None:
        self.wanted, self.service, self.prompts, self.echoes = wanted, service, prompts, echoes
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self.n = wanted.n or 1
        self.each = max(self.n, wanted.best_of or 1)
        stops = [wanted.stop] if isinstance(wanted.stop, str) else wanted.stop or []
        top_p = 1.0 if wanted.top_p is None else wanted.top_p
        options = Options(
            16 if wanted.max_tokens is None else wanted.max_tokens,
            1.0 if wanted.temperature is None else wanted.temperature,
            top_p=None if top_p in (0, 1) else top_p,
            top_k=None if top_p else 1,  # top_p 0 leaves only the likeliest token
            seed=wanted.seed,
            stops=stops,
            logprobs=0 if wanted.logprobs is None and self.each > self.n else wanted.logprobs,
        )
        pairs = [pair for pair in zip(prompts, echoes, strict=True) for _ in range(self.each)]
        self.completions = service.start(
            [Wanted(ids, options.numbered(place), len(echo.text)) for place, (ids, echo) in enumerate(pairs)]
        )

    @classmethod
    async def of(cls, wanted: CompletionRequest, service: Service) -> "_Asked":
        """Raises Refusal."""
        given = [""] if wanted.prompt is None else _prompts(wanted.prompt)
        prompts = [await service.encode(prompt) for prompt in given]
        echoes = [Text() for _ in prompts]
        if wanted.echo:
            echoes = [await _echo(*pair, wanted.logprobs, service) for pair in zip(given, prompts, strict=True)]
        return cls(wanted, service, prompts, echoes)

    async def answer(self) -> CompletionAnswer:
        texts = await wholes(self.completions)
        choices: list[Choice] = []
        for place, echo in enumerate(self.echoes):
            group = texts[place * self.each : (place + 1) * self.each]
            if self.each > self.n:
                group = sorted(group, key=_mean_logprob, reverse=True)[: self.n]
            for text in group:
                logprobs = self._logprobs(echo.parts + text.parts)
                choices.append(
                    Choice(
                        text=echo.text + text.text, index=len(choices), logprobs=logprobs, finish_reason=text.finished
                    )
                )
        steps = [text.step for text in texts if text.step is not None]
        return self._event(choices, max(steps, default=None), self._usage(sum(text.tokens for text in texts)))

    async def events(self) -> AsyncIterator[str]:
        """Yields the server-sent events of all choices as they come."""
        usage = bool(self.wanted.stream_options and self.wanted.stream_options.include_usage)
        events: asyncio.Queue[CompletionAnswer | Refusal | None] = asyncio.Queue()

        async def read(index: int, completion: Completion, echo: Text) -> None:
            try:
                if echo.text:
                    choice = Choice(
                        text=echo.text, index=index, logprobs=self._logprobs(echo.parts), finish_reason=None
                    )
                    events.put_nowait(self._event([choice], self.service.scheduler.step))
                async for piece in completion.pieces():
                    choice = Choice(
                        text=piece.text,
                        index=index,
                        logprobs=self._logprobs(piece.parts),
                        finish_reason=piece.finished,
                    )
                    events.put_nowait(self._event([choice], piece.step))
            except Refusal as refusal:
                events.put_nowait(refusal)
            events.put_nowait(None)

        readers = [
            asyncio.create_task(read(index, completion, self.echoes[index // self.each]))
            for index, completion in enumerate(self.completions)
        ]
        try:
            left = len(readers)
            while left:
                event = await events.get()
                if event is None:
                    left -= 1
                elif isinstance(event, Refusal):  # the status has been sent, so the stream has to say it
                    yield f"data: {json.dumps(error(event))}\n\n"
                    return
                else:
                    yield f"data: {event.model_dump_json(exclude=None if usage else {'usage'})}\n\n"
            if usage:
                tokens = sum(completion.tokens for completion in self.completions)
                yield f"data: {self._event([], self.service.scheduler.step, self._usage(tokens)).model_dump_json()}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            for reader, completion in zip(readers, self.completions, strict=True):
                reader.cancel()
                completion.close()

    def _event(self, choices: list[Choice], step: int | None, usage: Usage | None = None) -> CompletionAnswer:
        return CompletionAnswer(
            id=self.id,
            created=self.created,
            model=self.service.name,
            system_fingerprint=None if step is None else f"step-{step}",
            choices=choices,
            usage=usage,
        )

    def _usage(self, drawn: int) -> Usage:
        prompt = sum(map(len, self.prompts))
        return Usage(prompt_tokens=prompt, completion_tokens=drawn, total_tokens=prompt + drawn)

    def _logprobs(self, parts: Sequence[Part]) -> Logprobs | None:
        if self.wanted.logprobs is None:
            return None
        return {
            "tokens": [part.text for part in parts],
            "token_logprobs": [part.logprob for part in parts],
            "top_logprobs": [part.likeliest or None for part in parts],
            "text_offset": [part.offset for part in parts],
        }


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The prompts of a request as a list."""
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]
    return list(given)


async def _echo(prompt: str | list[int], ids: list[int], logprobs: int | None, service: Service) -> Text:
    """The prompt as the first part of the answer."""
    if not prompt:  # without the id that begins a text
        return Text()
    text = prompt if isinstance(prompt, str) else service.tokenizer.decode(ids)
    if logprobs is None:
        return Text(text)
    scored = await service.scheduler.score(ids, logprobs)
    offsets = [len(service.tokenizer.decode(ids[:place])) for place in range(len(ids))]
    first = Part(service.word(ids[0]), 0, None, {})
    return Text(text, [first, *(service.part(*pair) for pair in zip(scored, offsets[1:], strict=True))])


def _mean_logprob(text: Text) -> float:
    found = [part.logprob for part in text.parts if part.logprob is not None]
    return sum(found) / len(found) if found else 0.0
