"""An application that runs elsewhere than the HTTP server that is asked: requests go there as plain data, and answers come back as ASGI messages."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message

from mkdsl.serve._errors import ApiError
from mkdsl.serve._replies import event

FIELDS = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")


async def relayed(app: ASGIApp, scope: dict, body: bytes) -> AsyncGenerator[list[Message]]:
    """Asks an application.

    Args:
      app: the application.
      scope: the request's, as `plain_scope` has it.
      body: all of the request's body.

    Returns:
      An asynchronous iterator of ASGI messages, those together that are there at the same time; the first is `http.response.start`. Closing it, or
      cancelling who iterates, is to the application as if its client went away.
    """
    said: asyncio.Queue[Message | None] = asyncio.Queue()
    received = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        return next(received, None) or await asyncio.get_running_loop().create_future()  # nothing more comes

    answering = asyncio.ensure_future(app(dict(scope), receive, said.put))
    answering.add_done_callback(lambda _: said.put_nowait(None))
    try:
        while (message := await said.get()) is not None:
            messages = [message]
            while not said.empty() and (message := said.get_nowait()) is not None:
                messages.append(message)
            yield messages
            if message is None:
                break
        await answering
    finally:
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)


def plain_scope(request: Request) -> dict:
    """What of a request's scope is plain data, which can be sent elsewhere."""
    return {name: request.scope[name] for name in FIELDS if name in request.scope}


async def assembled(messages: AsyncIterator[list[Message]], *, lost: type[Exception]) -> Response:
    """The response that messages make.

    Args:
      messages: those of `relayed`.
      lost: what iterating raises when there is nobody any more who answers: 503 before the answer has begun, and else its last event.

    Returns:
      The response, which is begun by the time that this returns.
    """
    gone = ApiError(503, "who was to answer is gone; ask again", code="replica_lost")
    try:
        start, *begun = await anext(messages)
    except lost:
        return JSONResponse(gone.body, gone.status)

    async def body() -> AsyncIterator[bytes]:
        for message in begun:
            yield message["body"]
        try:
            async for several in messages:
                yield b"".join(message["body"] for message in several)
        except lost:
            yield event(gone.body).encode()

    response = StreamingResponse(body(), start["status"])
    response.raw_headers = start["headers"]
    return response
