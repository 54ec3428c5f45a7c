"""KServe's Open Inference Protocol, version 2, as far as a model of texts goes: metadata, ready, infer.

There is one input, `text_input`: strings (BYTES), each a prompt; and one output, `text_output`,
with as many strings. The request's `parameters` say how to generate.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from model_zoo.nanogpt.serving.completions import Options, Service, Wanted, wholes
from model_zoo.nanogpt.serving.openai import SEED, WHOLE, Stop, Strict
from model_zoo.nanogpt.serving.refusal import Refusal

INPUT, OUTPUT = "text_input", "text_output"


class ServerMetadata(BaseModel):
    name: str = "elastic-gpt"
    version: str
    extensions: list[str] = []


class TensorMetadata(BaseModel):
    name: str
    datatype: Literal["BYTES"] = "BYTES"
    shape: list[int] = [-1]


class ModelMetadata(BaseModel):
    """Metadata of the model. Its only version is its step."""

    name: str
    versions: list[str]
    platform: str = "pytorch"
    inputs: list[TensorMetadata] = [TensorMetadata(name=INPUT)]
    outputs: list[TensorMetadata] = [TensorMetadata(name=OUTPUT)]


class Parameters(Strict):
    """How to generate. Defaults are those of `elastic-gpt generate`."""

    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    temperature: float = Field(default=0.8, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Annotated[int, Field(ge=1, lt=SEED), WHOLE] | None = None
    seed: Annotated[int, Field(ge=-SEED, lt=SEED), WHOLE] | None = None
    stop: Stop | None = None


class Input(Strict):
    name: Literal["text_input"]
    datatype: Literal["BYTES"]
    shape: Annotated[list[Annotated[int, Field(ge=1), WHOLE]], Field(min_length=1, max_length=2)]
    data: Annotated[list[str], Field(min_length=1)]
    parameters: dict[str, Any] | None = None


class RequestedOutput(Strict):
    name: Literal["text_output"]
    parameters: dict[str, Any] | None = None


class InferRequest(Strict):
    id: str | None = None
    parameters: Parameters | None = None
    inputs: Annotated[list[Input], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[RequestedOutput], Field(max_length=1)] | None = None


class Output(BaseModel):
    name: str = OUTPUT
    datatype: Literal["BYTES"] = "BYTES"
    shape: list[int]
    data: list[str]


class InferAnswer(BaseModel):
    """An answer. `model_version` is the step of the model that gave it."""

    model_name: str
    model_version: str | None
    id: str | None
    outputs: list[Output]


class Error(BaseModel):
    error: str


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool


class ModelReady(Ready):
    name: str


def error(refusal: Refusal) -> dict[str, Any]:
    """A refusal in the form of the protocol."""
    return {"error": refusal.message}


def router(service: Service, dependencies: Sequence[Any], responses: Mapping[int | str, dict[str, Any]]) -> APIRouter:
    routes = APIRouter(prefix="/v2", tags=["KServe"])
    models = APIRouter(
        prefix="/models/{name}", dependencies=list(dependencies), responses=dict(responses) | {404: {"model": Error}}
    )

    def check(name: str, number: str | None = None) -> None:
        if name != service.name or number not in (None, _version(service)):
            what = f"model {name!r}" if name != service.name else f"version {number!r} of the model"
            raise Refusal(404, f"there is no {what}: here is {service.name!r}, version {_version(service)}")

    # --- the server

    @routes.get("")
    async def server() -> ServerMetadata:
        return ServerMetadata(version=version("elastic-gpt"))

    @routes.get("/health/live")
    async def live() -> Live:
        return Live(live=True)

    @routes.get("/health/ready", responses={503: {"model": Ready}})
    async def ready(response: Response) -> Ready:
        response.status_code = 503 if service.scheduler.failed else 200
        return Ready(ready=not service.scheduler.failed)

    # Without a version and with one: two routes each, for of one an optional number would be a query parameter.

    @models.get("")
    async def metadata(name: str) -> ModelMetadata:
        check(name)
        step = _version(service)
        return ModelMetadata(name=name, versions=[] if step is None else [step])

    @models.get("/versions/{number}")
    async def version_metadata(name: str, number: str) -> ModelMetadata:
        check(name, number)
        return await metadata(name)

    @models.get("/ready", responses={503: {"model": ModelReady}})
    async def model_ready(response: Response, name: str) -> ModelReady:
        check(name)
        response.status_code = 503 if service.scheduler.failed else 200
        return ModelReady(name=name, ready=not service.scheduler.failed)

    @models.get("/versions/{number}/ready", responses={503: {"model": ModelReady}})
    async def version_ready(response: Response, name: str, number: str) -> ModelReady:
        check(name, number)
        return await model_ready(response, name)

    @models.post("/versions/{number}/infer")
    async def version_infer(wanted: InferRequest, name: str, number: str) -> InferAnswer:
        check(name, number)
        return await infer(wanted, name)

    @models.post("/infer")
    async def infer(wanted: InferRequest, name: str) -> InferAnswer:
        check(name)
        [given] = wanted.inputs
        count = 1
        for size in given.shape:
            count *= size
        if count != len(given.data):
            raise Refusal(400, f"shape {given.shape} is of {count} prompts, data has {len(given.data)}: change one")
        ids = [await service.encode(prompt) for prompt in given.data]
        how = wanted.parameters or Parameters()
        options = Options(
            how.max_tokens or service.usual_tokens,
            how.temperature,
            how.top_p,
            how.top_k,
            how.seed,
            [how.stop] if how.stop else [],
        )
        wants = [Wanted(prompt, options.numbered(place)) for place, prompt in enumerate(ids)]
        texts = await wholes(service.start(wants))
        step = max((text.step for text in texts if text.step is not None), default=None)
        return InferAnswer(
            model_name=name,
            model_version=None if step is None else str(step),
            id=wanted.id,
            outputs=[Output(shape=given.shape, data=[text.text for text in texts])],
        )

    routes.include_router(models)
    return routes


def _version(service: Service) -> str | None:
    step = service.scheduler.step
    return None if step is None else str(step)
