"""From requests to the engine and back: who may begin, whole answers and streams, and clients that go away."""

import asyncio
import collections
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Iterator, Sequence

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mkdsl.engine import Answer, Delta, Engine, EngineError, LogitsError, SamplingParams, answers
from mkdsl.serve._errors import REFUSALS, ApiError, refusal
from mkdsl.serve._metrics import Metrics
from mkdsl.serve._replies import ChatReply, CompletionReply, Reply, event
from mkdsl.serve._requests import ChatRequest, Common, CompletionRequest

FAILURES = (EngineError, LogitsError)
MOST_CHARACTERS = 256  # that a token stands for: a long run of spaces, say
CLIENT_GONE = 499  # nobody reads it; it stands in the metrics


class Service:
    """The two endpoints that answer.

    Attributes:
      engine: the engine.
      model: the name that requests give.
      metrics: counters.
    """

    def __init__(self, engine: Engine, *, model: str, max_open: int) -> None:
        """At most `max_open` answers are under way or wait; beyond, requests are sent away."""
        self.engine, self.model, self.metrics = engine, model, Metrics(engine)
        self._max_open, self._open, self._seconds = max_open, 0, 1.0

    async def completions(self, request: Request, body: CompletionRequest) -> Response:
        """/v1/completions."""
        self._check_model(body)
        with refusing():
            tokens = [await asyncio.to_thread(self._tokens, prompt) for prompt in body.prompts]
            return await self._answer(request, body, body.sampling, tokens, CompletionReply)

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """/v1/chat/completions."""
        self._check_model(body)
        with refusing():
            messages = [message.as_template_wants() for message in body.messages]
            tokens = await asyncio.to_thread(self._chat_tokens, messages)
            return await self._answer(request, body, body.sampling, [tokens], ChatReply)

    def _check_model(self, body: Common) -> None:
        if body.model != self.model:
            raise ApiError(
                404, f"there is no model {body.model!r} here; the one served is {self.model!r}", param="model", code="model_not_found"
            )

    async def _answer(
        self, request: Request, body: Common, params: SamplingParams, prompts: Sequence[list[int]], kind: type[Reply]
    ) -> Response:
        with contextlib.ExitStack() as room:
            room.enter_context(self._room(len(prompts) * params.n))
            said = self._measured(self.engine.stream_all(prompts, params))
            prompt_tokens = sum(map(len, prompts))
            self.metrics.prompt_tokens.inc(prompt_tokens)
            reply = kind(model=self.model, spell=self._spell, n=params.n)
            if body.stream:
                usage = prompt_tokens if body.stream_options and body.stream_options.include_usage else None
                return _Stream(_events(said, reply, usage), room.pop_all())
            whole = asyncio.ensure_future(_collected(said))
            if not await _while_connected(request, whole):
                return Response(status_code=CLIENT_GONE)
            return JSONResponse(reply.body(whole.result(), prompt_tokens))

    @contextlib.contextmanager
    def _room(self, count: int) -> Iterator[None]:
        """So many answers are open in here; or who asks is sent away."""
        if count > self._max_open:
            raise ApiError(400, f"{count} answers are asked for at once, and this server takes {self._max_open}; ask for fewer", param="n")
        if self._open + count > self._max_open:
            wait = min(max(math.ceil(self._seconds), 1), 60)
            raise ApiError(
                429, f"{self._open} answers are under way or wait, of at most {self._max_open}; try again in {wait} s",
                code="rate_limit_exceeded", retry_after=wait,
            )  # fmt: skip
        begun = time.perf_counter()
        self._open += count
        try:
            yield
        finally:
            self._open -= count
            self._seconds += 0.2 * (time.perf_counter() - begun - self._seconds)  # a moving mean: how soon room may be expected

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        """Of a prompt; a long text takes a while, so this is called in a thread of its own."""
        self._check_length(len(prompt))
        return self.engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def _chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        self._check_length(sum(len(message["content"]) for message in messages))
        return self.engine.tokenizer.encode_chat(messages)

    def _check_length(self, length: int) -> None:
        """Refuses what is far too long before it is made tokens of: that would take seconds, in which nobody else is served."""
        if length > (most := MOST_CHARACTERS * self.engine.context):
            raise ApiError(
                400, f"the prompt has a length of {length}, and {self.engine.context} tokens hold at most {most} characters; shorten it",
                code="context_length_exceeded",
            )  # fmt: skip

    def _spell(self, token: int) -> str:
        return self.engine.tokenizer.model.decode([token], skip_special_tokens=False)

    async def _measured(self, deltas: AsyncGenerator[Delta]) -> AsyncGenerator[Delta]:
        """The deltas, counted. However this ends, the engine's answers end with it."""
        begun, first, tokens = time.perf_counter(), {}, collections.Counter()
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                now, answer = time.perf_counter(), (delta.prompt, delta.choice)
                if answer not in first:
                    first[answer] = now, len(delta.tokens)
                    self.metrics.first_token.observe(now - begun)
                tokens[answer] += len(delta.tokens)
                self.metrics.answer_tokens.inc(len(delta.tokens))
                if delta.finish and (later := tokens[answer] - first[answer][1]):
                    self.metrics.per_token.observe((now - first[answer][0]) / later)
                yield delta


class _Stream(StreamingResponse):
    """Server-sent events; however they end, the generator does, and the room is given back."""

    def __init__(self, events: AsyncGenerator[str], room: contextlib.ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events, self._room = events, room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._room:
            async with contextlib.aclosing(self._events):
                await super().__call__(scope, receive, send)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """What the engine refuses or fails at, as the API says it."""
    try:
        yield
    except REFUSALS as error:
        raise refusal(error) from None
    except FAILURES as error:
        raise ApiError(500, str(error)) from None


async def _collected(deltas: AsyncGenerator[Delta]) -> list[tuple[Answer, ...]]:
    async with contextlib.aclosing(deltas):
        return answers([delta async for delta in deltas])


async def _while_connected(request: Request, answering: asyncio.Future) -> bool:
    """Waits for the answer; or ends it and returns False, if the client goes away before."""
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answering.done()
    finally:
        for task in (answering, gone):
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(deltas: AsyncGenerator[Delta], reply: Reply, usage: int | None) -> AsyncGenerator[str]:
    """Server-sent events. The status is sent by now: an error is an event too, and the last one."""
    begun, tokens = set(), 0
    try:
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                answer = delta.prompt, delta.choice
                yield event(reply.chunk(delta, first=answer not in begun))
                begun.add(answer)
                tokens += len(delta.tokens)
        if usage is not None:
            yield event(reply.last_chunk(usage, tokens))
        yield "data: [DONE]\n\n"
    except FAILURES as error:
        yield event(ApiError(500, str(error)).body)
