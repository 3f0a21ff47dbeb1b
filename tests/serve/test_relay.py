"""An application asked through `relayed` and `assembled` is as if it were asked by itself."""

import asyncio
import contextlib
import json

import httpx2
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from mkdsl.serve import assembled, plain_scope, relayed

left = []


def application():
    app = FastAPI()

    @app.post("/echo/{name}")
    async def echo(name: str, request: Request):
        return {"name": name, "asked": request.url.query, "key": request.headers["authorization"], "body": (await request.body()).decode()}

    @app.get("/count")
    async def count():
        async def numbers():
            try:
                for i in range(5):
                    yield f"{i}\n"
                    await asyncio.sleep(0)
            finally:
                left.append("count")

        return StreamingResponse(numbers(), 201, media_type="text/plain")

    @app.get("/fails")
    async def fails():
        raise ZeroDivisionError

    return app


class Gone(Exception):
    pass


async def cut(messages, after):
    """Only so many times some of them come."""
    async with contextlib.aclosing(messages):
        for _ in range(after):
            yield await anext(messages)
        raise Gone


def front(app, *, after=None):
    there = FastAPI()

    @there.api_route("/{path:path}", methods=["GET", "POST"])
    async def forward(request: Request):
        scope = json.loads(json.dumps(plain_scope(request), default=bytes.decode))  # plain data, but for bytes
        scope = {name: [(k.encode(), v.encode()) for k, v in value] if name == "headers" else value for name, value in scope.items()}
        scope |= {name: scope[name].encode() for name in ("query_string", "raw_path")}
        messages = relayed(app, scope, await request.body())
        return await assembled(messages if after is None else cut(messages, after), lost=Gone)

    return there


def answers(app, *requests):
    async def ask():
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://x") as client:
            return [await client.request(method, path, headers={"authorization": "k"}, content=body) for method, path, body in requests]

    return asyncio.run(ask())


def test_answers_are_the_same():
    requests = [("POST", "/echo/a%20b?x=1&y", b"hello"), ("GET", "/count", b""), ("GET", "/nowhere", b""), ("PUT", "/count", b"")]
    for near, far in zip(answers(application(), *requests[:3]), answers(front(application()), *requests[:3]), strict=True):
        assert (near.status_code, near.headers, near.content) == (far.status_code, far.headers, far.content)


def test_what_fails_there_fails_here():
    with pytest.raises(ZeroDivisionError):
        answers(front(application()), ("GET", "/fails", b""))


def test_who_is_gone_before_the_answer():
    (reply,) = answers(front(application(), after=0), ("GET", "/count", b""))
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "replica_lost")


def test_who_is_gone_in_the_middle():
    (reply,) = answers(front(application(), after=1), ("GET", "/count", b""))
    assert reply.status_code == 201
    first, _, event = reply.text.partition("data: ")
    assert "0\n1\n2\n3\n".startswith(first) and json.loads(event)["error"]["code"] == "replica_lost"


def test_who_goes_away_ends_the_application():
    async def leave():
        scope = {"type": "http", "method": "GET", "path": "/count", "headers": [], "query_string": b"", "http_version": "1.1"}
        async with contextlib.aclosing(relayed(application(), scope, b"")) as messages:
            await anext(messages)
            assert not left

    left.clear()
    asyncio.run(leave())
    assert left == ["count"]
