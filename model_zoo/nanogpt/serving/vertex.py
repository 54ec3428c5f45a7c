"""Vertex AI's contract for a custom container: instances in, predictions out.

An instance is a prompt, and its prediction the text that follows. Or it is an object with a
`prompt` and parameters, and its prediction is an object too.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from model_zoo.nanogpt.serving.completions import Options, Service, Wanted, wholes
from model_zoo.nanogpt.serving.openai import SEED, WHOLE, Stop, Strict
from model_zoo.nanogpt.serving.refusal import Refusal

STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}


class Parameters(Strict):
    """How to generate, with the names of Vertex AI's text models. Defaults are those of `elastic-gpt generate`."""

    maxOutputTokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    topP: float | None = Field(default=None, gt=0, le=1)
    topK: Annotated[int, Field(ge=1, lt=SEED), WHOLE] | None = None
    seed: Annotated[int, Field(ge=-SEED, lt=SEED), WHOLE] | None = None
    stopSequences: Annotated[list[Stop], Field(max_length=16)] | None = None


class Instance(Parameters):
    prompt: str


class PredictRequest(Strict):
    instances: Annotated[list[str | Instance], Field(min_length=1)]
    parameters: Parameters | None = None


class Prediction(Strict):
    text: str
    finishReason: str
    tokens: int
    step: int | None


class PredictAnswer(Strict):
    predictions: list[str | Prediction]


class ErrorFields(Strict):
    code: int
    message: str
    status: str


class Error(Strict):
    error: ErrorFields


def error(refusal: Refusal) -> dict[str, Any]:
    """A refusal in the form that Google's clients read."""
    status = STATUSES.get(refusal.status, "UNKNOWN")
    return Error(error=ErrorFields(code=refusal.status, message=refusal.message, status=status)).model_dump()


def router(
    service: Service, route: str, dependencies: Sequence[Any], responses: Mapping[int | str, dict[str, Any]]
) -> APIRouter:
    routes = APIRouter(tags=["Vertex AI"], dependencies=list(dependencies), responses=dict(responses))

    @routes.post(route)
    async def predict(wanted: PredictRequest) -> PredictAnswer:
        shared = wanted.parameters or Parameters()
        wants = []
        for place, instance in enumerate(wanted.instances):
            prompt, own = (instance, shared) if isinstance(instance, str) else (instance.prompt, instance)
            ids = await service.encode(prompt, param=f"instances[{place}]")
            wants.append(Wanted(ids, _options(own, shared, service.usual_tokens).numbered(place)))
        texts = await wholes(service.start(wants))
        return PredictAnswer(
            predictions=[
                text.text
                if isinstance(instance, str)
                else Prediction(text=text.text, finishReason=text.finished, tokens=text.tokens, step=text.step)
                for instance, text in zip(wanted.instances, texts, strict=True)
            ]
        )

    return routes


def _options(own: Parameters, shared: Parameters, usual_tokens: int) -> Options:
    """The options of an instance: its own parameters, else those for all, else those of `elastic-gpt generate`."""
    given: dict[str, Any] = {"maxOutputTokens": usual_tokens, "temperature": 0.8}
    for parameters in (shared, own):
        given |= {
            name: getattr(parameters, name) for name in Parameters.model_fields if getattr(parameters, name) is not None
        }
    return Options(
        given["maxOutputTokens"],
        given["temperature"],
        top_p=given.get("topP"),
        top_k=given.get("topK"),
        seed=given.get("seed"),
        stops=given.get("stopSequences", []),
    )
