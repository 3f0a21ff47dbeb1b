"""The application: paths, keys, and errors of all kinds in OpenAI's form."""

import asyncio
import functools
import secrets
from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mkdsl.engine import Engine
from mkdsl.serve._errors import ApiError, invalid
from mkdsl.serve._metrics import Metrics
from mkdsl.serve._service import Service

PATIENCE = 30  # seconds
PATHS = {"/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics", "/health"}


def create_app(engine: Engine, *, model: str, api_key: str | None = None, max_open: int) -> FastAPI:
    """The server as an ASGI application: what `mkdsl serve` runs, for whoever has an engine or an HTTP server of their own.

    Args:
      engine: answers; closing it is the caller's business.
      model: the name that it is known by.
      api_key: asked for by all paths but /health; None for no key.
      max_open: answers that are under way or wait at most; beyond, requests get 429.

    Returns:
      The application.
    """
    service = Service(engine, model=model, max_open=max_open)
    app = FastAPI(title="mkdsl", docs_url=None, redoc_url=None, openapi_url=None)
    keyed = [Depends(_key_check(api_key))]
    app.add_api_route("/v1/completions", service.completions, methods=["POST"], dependencies=keyed, response_model=None)
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"], dependencies=keyed, response_model=None)
    app.add_api_route("/v1/models", lambda: {"object": "list", "data": [_model(model, model)]}, dependencies=keyed)
    app.add_api_route("/v1/models/{name:path}", functools.partial(_model, model), dependencies=keyed)
    app.add_api_route("/metrics", lambda: Response(service.metrics.text(), media_type="text/plain; version=0.0.4"), dependencies=keyed)
    app.add_api_route("/health", lambda: Response(status_code=503 if engine.closed else 200))
    _handle_errors(app)
    app.add_middleware(Hurried)
    app.add_middleware(Counted, metrics=service.metrics)
    return app


def _key_check(api_key: str | None) -> Callable[[Request], None]:
    def check(request: Request) -> None:
        said = request.headers.get("authorization", "")
        if api_key is not None and not secrets.compare_digest(said.encode(), f"Bearer {api_key}".encode()):
            wrong = "the API key is wrong" if said else "no API key"
            raise ApiError(401, f"{wrong}; give this server's as Authorization: Bearer KEY", code="invalid_api_key")

    return check


def _model(served: str, name: str) -> dict[str, Any]:
    if name != served:
        raise ApiError(404, f"there is no model {name!r} here; the one served is {served!r}", param="model", code="model_not_found")
    return {"id": served, "object": "model", "created": 0, "owned_by": "mkdsl"}


def _handle_errors(app: FastAPI) -> None:
    def shown(_: Request, error: Exception) -> Response:
        said = _as_api_error(error)
        headers = {} if said.retry_after is None else {"Retry-After": str(said.retry_after)}
        return JSONResponse(said.body, said.status, headers)

    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, shown)


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return invalid(error)
    if isinstance(error, HTTPException):
        if isinstance(error.__cause__, ApiError):
            return error.__cause__
        if error.status_code == 400:  # all that FastAPI says by itself
            return ApiError(400, "the body is not JSON (it is not UTF-8, or nested too deeply)")
        return ApiError(error.status_code, f"{error.detail}; there are {', '.join(sorted(PATHS))}")
    return ApiError(500, f"the server failed ({type(error).__name__}: {error})")


class Hurried:
    """Waits for a body no longer than half a minute: else somebody who sends half of one would keep the server from ending."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        complete, end = scope["type"] != "http", asyncio.get_running_loop().time() + PATIENCE

        async def hurried() -> Message:
            nonlocal complete
            if complete:  # what follows is that the client goes away; or the server ends, of a lifespan
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"the body was not complete after {PATIENCE} s; send it again") from None
            complete = not message.get("more_body", False)
            return message

        await self._app(scope, hurried, send)


class Counted:
    """Counts requests by path and status. Paths that there are not are one: else anybody could make up as many as memory holds."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in PATHS else "other"
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)
