"""The server: one FastAPI application with all dialects, the page, and the routes for Kubernetes and Prometheus."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model_zoo.nanogpt.serving import kserve, openai, vertex
from model_zoo.nanogpt.serving.completions import MOST_BYTES, Service
from model_zoo.nanogpt.serving.refusal import Refusal

PAGE = Path(__file__).parent / "page"
ASSETS = {"page.css": "text/css", "page.js": "text/javascript"}
GRACE = 5.0
"""Seconds after the time limit in which a client may still read the end of an answer."""

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class Health(BaseModel):
    status: str
    model: str
    step: int | None


def create_app(
    service: Service,
    *,
    token: str | None = None,
    health_route: str = "/health",
    predict_route: str = "/predict",
    background: Callable[[], Any] | None = None,
) -> FastAPI:
    """The application.

    Args:
        token: bearer token that clients must send; None: anybody is served.
        health_route: path of Vertex AI's health checks.
        predict_route: path to which it sends instances.
        background: a coroutine function that runs as long as the server does.
    """

    # --- the application, and what runs as long as it does

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        task = asyncio.ensure_future(background()) if background else None
        yield
        if task:
            task.cancel()
        service.scheduler.stop()

    app = FastAPI(
        title="ElasticGPT",
        version=version("elastic-gpt"),
        description=f"The model {service.name} behind HTTP.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from a CDN
        redoc_url=None,
    )
    # --- what it answers

    dependencies = [Depends(_bearer(token))] if token else []

    def refusals(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
        statuses = [400, *([401] if token else []), 413, 429, 500, 503]
        return {status: {"model": model, "description": _DESCRIPTIONS[status]} for status in statuses}

    app.include_router(openai.router(service, dependencies, refusals(openai.Error)))
    app.include_router(kserve.router(service, dependencies, refusals(kserve.Error)))
    app.include_router(vertex.router(service, predict_route, dependencies, refusals(vertex.Error)))
    _add_operations(app, service, health_route)
    _add_page(app)

    # --- what it refuses, each time in the dialect of the path

    def answer(path: str, refusal: Refusal) -> JSONResponse:
        dialect = openai.error
        if path == predict_route:
            dialect = vertex.error
        elif path == "/v2" or path.startswith("/v2/"):
            dialect = kserve.error
        return JSONResponse(dialect(refusal), refusal.status, refusal.headers())

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        return answer(request.url.path, refusal)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(request.url.path, _first_mistake(error))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        method, path = request.method, request.url.path
        told = {404: f"there is nothing at {path}", 405: f"{path} does not take {method}"}.get(error.status_code)
        refused = answer(path, Refusal(error.status_code, told or str(error.detail)))
        refused.headers.update(error.headers or {})
        return refused

    @app.exception_handler(Exception)
    async def failed(request: Request, _error: Exception) -> JSONResponse:
        return answer(request.url.path, Refusal(500, "the server failed: its log says why"))

    app.add_middleware(_Guard, service=service, answer=answer)
    return app


_DESCRIPTIONS = {
    400: "A mistake in the request; half a character (a lone surrogate such as \\ud800) in a string that is read is one",
    401: "The bearer token is missing or wrong",
    413: f"More than {MOST_BYTES:,} bytes",
    429: "Too many requests at a time; Retry-After says when to try again",
    500: "The model failed",
    503: "The answer took too long",
}


def _bearer(token: str) -> Callable[..., Any]:
    scheme = HTTPBearer(auto_error=False)

    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Security(scheme)]) -> None:
        # In constant time, so that the duration does not tell how much of a guess was right.
        if given is None or not hmac.compare_digest(given.credentials.encode(), token.encode()):
            raise Refusal(401, "the bearer token is missing or wrong: send 'Authorization: Bearer TOKEN'")

    return check


def _add_operations(app: FastAPI, service: Service, health_route: str) -> None:
    async def health(response: Response) -> Health:
        failed = service.scheduler.failed
        response.status_code = 503 if failed else 200
        return Health(status="failed" if failed else "ok", model=service.name, step=service.scheduler.step)

    for route in dict.fromkeys((health_route, "/health", "/ready")):
        name = route.strip("/") or "root"
        app.get(route, tags=["operations"], operation_id=f"get_{name}", responses={503: {"model": Health}})(health)

    @app.get("/metrics", tags=["operations"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", media_type="text/html", headers=PAGE_HEADERS)

    @app.get("/page/{name}", include_in_schema=False)
    async def asset(name: str) -> FileResponse:
        if name not in ASSETS:
            raise HTTPException(404)
        return FileResponse(PAGE / name, media_type=ASSETS[name], headers=PAGE_HEADERS)


def _first_mistake(error: RequestValidationError) -> Refusal:
    """The first of pydantic's errors as one line: the field, and what is wrong with it."""
    errors = error.errors()
    first = next((one for one in errors if one["type"] == "string_unicode"), errors[0])
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is not JSON: {first['ctx']['error']}")
    if first["type"] == "string_unicode":
        name = place[0] if place else "a name"
        return Refusal(400, f"{name} has half a character (a lone surrogate): send whole ones", param=name)
    if not place:
        return Refusal(400, "the body is not a JSON object: send one, with Content-Type: application/json")
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"Unrecognized request argument supplied: {'.'.join(place)}", param=place[0])
    return Refusal(400, f"{'.'.join(place)}: {first['msg']}", param=place[0])


class _Guard:
    """Around every request: limits its body and its time, ends it if its client leaves, and counts it."""

    def __init__(self, app: ASGIApp, service: Service, answer: Callable[[str, Refusal], JSONResponse]) -> None:
        self.app, self.service, self.answer = app, service, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            async with asyncio.timeout(self.service.limits.seconds + GRACE):
                await self._answer(scope, receive, counted)
        except TimeoutError:  # the body did not come, or the answer was not read; its slot is free now
            if not status:
                refusal = Refusal(503, f"the request took more than {self.service.limits.seconds:g} s")
                await self.answer(scope["path"], refusal)(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.service.metrics.requests.labels(route, str(status or "gone")).inc()
            self.service.metrics.request_seconds.labels(route).observe(time.monotonic() - began)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _body(receive)
        if body is None:
            return
        if len(body) > MOST_BYTES:
            refusal = Refusal(413, f"the request has more than {MOST_BYTES:,} bytes: shorten the prompt")
            await self.answer(scope["path"], refusal)(scope, receive, send)
            return
        parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.ensure_future(_disconnected(receive))

        async def replay() -> Message:
            return parts.pop() if parts else await asyncio.shield(gone)

        answered = asyncio.ensure_future(self.app(scope, replay, send))
        try:
            await asyncio.wait((answered, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            answered.cancel()  # has no effect if it is done
            await asyncio.wait((answered,))
        if not answered.cancelled():
            answered.result()


async def _body(receive: Receive) -> bytes | None:
    """The body, cut if it is too long; None if the client left before its end."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        # The rest is read and dropped, since a client reads no answer while it still sends.
        if len(body) <= MOST_BYTES:
            body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


async def _disconnected(receive: Receive) -> Message:
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message
