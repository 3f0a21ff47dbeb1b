"""OpenAI's own client against the server."""

import asyncio
import collections
import concurrent.futures
import json
import socket
import time
import urllib.error
import urllib.request

import openai
import pytest
from serve.conftest import KEY, MAX_OPEN

from mkdsl.engine import Engine, EngineError, SamplingParams
from mkdsl.serve import _app, create_app, relayed

pytestmark = pytest.mark.medium
USER = [{"role": "user", "content": "hello"}]
ON = {"257": -100}  # no end token
SEEDED = {"model": "tiny", "seed": 3, "max_tokens": 12}


def wait_until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about in a minute")


@pytest.fixture(autouse=True)
def everything_is_given_back(engine):
    yield
    wait_until(lambda: (engine.stats().waiting, engine.stats().running) == (0, 0))
    assert engine.stats().free == engine.stats().pages


def test_a_completion_is_the_engines(client, engine):
    reply = client.completions.create(prompt="hello", **SEEDED)
    ((answer,),) = engine.generate(["hello"], SamplingParams(seed=3, max_tokens=12))
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (answer.text, answer.finish)
    assert reply.object == "text_completion" and reply.id.startswith("cmpl-") and reply.model == "tiny"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (6, len(answer.tokens))
    assert reply.choices[0].logprobs is None


def test_a_chat_is_the_engines(client, engine):
    reply = client.chat.completions.create(messages=USER, logit_bias=ON, **SEEDED)
    prompt = engine.tokenizer.encode_chat(USER)
    ((answer,),) = engine.generate([prompt], SamplingParams(seed=3, max_tokens=12, logit_bias={257: -100}))
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (answer.text, "length")
    assert reply.choices[0].message.role == "assistant"
    assert reply.usage.total_tokens == len(prompt) + 12


def test_text_in_parts(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    replies = [client.chat.completions.create(messages=messages, **SEEDED) for messages in (USER, parts)]
    assert replies[0].choices == replies[1].choices


def test_an_answer_goes_back_as_it_came(client):
    """As clients hold a conversation."""
    said = client.chat.completions.create(messages=USER, logit_bias=ON, **SEEDED).choices[0].message
    for back in (said, said.model_dump()):  # the latter with a null for each field that there might have been
        reply = client.chat.completions.create(messages=[*USER, back, {**USER[0], "name": "somebody"}], **SEEDED)
        assert reply.usage.prompt_tokens > 12


@pytest.mark.parametrize("prompt", [["hello", "hé"], [[1, 2, 3], [4]], [1, 2, 3]])
def test_prompts_of_all_kinds(client, engine, prompt):
    reply = client.completions.create(prompt=prompt, n=2, logit_bias=ON, **SEEDED)
    prompts = [prompt] if isinstance(prompt[0], int) else prompt
    params = SamplingParams(seed=3, max_tokens=12, n=2, logit_bias={257: -100})
    expected = [answer.text for answers in engine.generate(prompts, params) for answer in answers]
    assert [choice.text for choice in reply.choices] == expected
    assert [choice.index for choice in reply.choices] == list(range(2 * len(prompts)))


def test_streams_are_the_same(client):
    ask = {"prompt": ["hello", "hé"], "n": 2, "logit_bias": ON, "logprobs": 2, **SEEDED}
    whole = client.completions.create(**ask)
    text, finish, offsets = ["", "", "", ""], [None] * 4, [[], [], [], []]
    for chunk in client.completions.create(stream=True, **ask):
        (choice,) = chunk.choices
        text[choice.index] += choice.text
        finish[choice.index] = choice.finish_reason
        offsets[choice.index] += choice.logprobs.text_offset
        assert chunk.object == "text_completion" and chunk.usage is None
    assert text == [choice.text for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
    assert finish == ["length"] * 4


def test_chat_streams_are_the_same(client):
    ask = {"messages": USER, "n": 2, "logit_bias": ON, **SEEDED}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **ask))
    for index, choice in enumerate(whole.choices):
        deltas = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert "".join(d.delta.content for d in deltas) == choice.message.content
        assert [d.delta.role for d in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason == "length"
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert {c.id for c in chunks} == {chunks[0].id}


def test_logprobs(client, engine):
    params = {"model": "tiny", "temperature": 0, "max_tokens": 4, "logit_bias": ON}
    ((answer,),) = engine.generate(["hello"], SamplingParams(temperature=0, max_tokens=4, logprobs=2, logit_bias={257: -100}))
    said = client.completions.create(prompt="hello", logprobs=2, **params).choices[0].logprobs
    assert said.token_logprobs == pytest.approx([one.logprob for one in answer.logprobs])
    assert [max(top.values()) for top in said.top_logprobs] == pytest.approx([one.top[0][1] for one in answer.logprobs])
    chat = client.chat.completions.create(messages=USER, logprobs=True, top_logprobs=2, **params).choices[0].logprobs
    assert [len(one.top_logprobs) for one in chat.content] == [2] * 4
    for one in chat.content:
        assert one.bytes is None if "\ufffd" in one.token else bytes(one.bytes).decode() == one.token
    bare = client.chat.completions.create(messages=USER, logprobs=True, **params).choices[0].logprobs
    assert [one.logprob for one in bare.content] == [one.logprob for one in chat.content]
    assert not bare.content[0].top_logprobs


def test_stop_strings(client):
    ask = {"prompt": "hello", "temperature": 0, "logit_bias": ON, "model": "tiny", "max_tokens": 12}
    text = client.completions.create(**ask).choices[0].text
    stopped = client.completions.create(stop=text[5:7], **ask).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(text[5:7])], "stop")


def test_fields_that_are_not_openais(client):
    ask = {"prompt": "hello", **SEEDED}
    free = client.completions.create(**ask)
    bound = client.completions.create(extra_body={"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [7]}, **ask)
    assert free.choices[0].text != bound.choices[0].text


@pytest.mark.parametrize(
    ("ask", "message", "param", "code"),
    [
        ({"max_tokens": 300}, "the prompt takes 6 tokens of a context of 256, and 300 more are asked for", None, "context_length_exceeded"),
        ({"prompt": "x" * 300}, "takes 301 tokens of a context of 256", None, "context_length_exceeded"),
        ({"prompt": [999]}, "the prompt has the token 999; token ids are 0 to 259", None, None),
        ({"extra_body": {"prompt": []}}, "prompt is empty; give some text or tokens", "prompt", None),
        ({"prompt": []}, "prompt is empty", "prompt", None),
        ({"temperature": -1.0}, "temperature=-1.0; it is 0", "temperature", None),
        ({"top_p": 0.0}, "top_p=0.0; it is more than 0", "top_p", None),
        ({"n": 0}, "n=0; it is an integer of at least 1", "n", None),
        ({"n": 1 << 40}, "answers are asked for at once", "n", None),
        ({"n": 7}, "7 answers are asked for at once, and this server takes 6", "n", None),
        ({"logprobs": 21}, "logprobs=21; it is None", "logprobs", None),
        ({"logit_bias": {"x": 1}}, "its keys are token ids", "logit_bias", None),
        ({"logit_bias": {"260": 1}}, "logit_bias names token 260, past the vocabulary", None, None),
        ({"echo": True}, "echo: input should be false", "echo", None),
        ({"extra_body": {"guided": 1}}, "guided is not supported by this server; leave it out", "guided", "unknown_parameter"),
        ({"extra_body": {"prompt": [1, "a"]}}, "prompt: it is text, a list of token ids, or a list of either", "prompt", None),
        ({"extra_body": {"stop": [1]}}, "stop: it is text, or a list of texts", "stop", None),
        ({"prompt": "x" * (256 * 256 + 1)}, "256 tokens hold at most 65536 characters; shorten it", None, "context_length_exceeded"),
        ({"extra_body": {"max_tokens": "12"}}, "max_tokens: input should be a valid integer", "max_tokens", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused(client, ask, message, param, code, stream):
    """With its status, before a stream begins too."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "hello", "stream": stream} | ask)
    assert message in caught.value.body["message"]
    assert (caught.value.param, caught.value.code, caught.value.type) == (param, code, "invalid_request_error")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"messages": []}, "messages: list should have at least 1 item"),
        ({"messages": [{"role": "system", "content": "be good"}]}, "its chat template refuses this conversation (no system prompt)"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x" * (256 * 256 + 1)}]}, "256 tokens hold at most 65536 characters; shorten it"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content: it is text, or a list of parts"),
        ({"top_logprobs": 2}, "top_logprobs=2 without logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options without a stream; set stream to true"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported by this server"),
        ({"response_format": {"type": "json_object"}}, "response_format.type: input should be 'text'"),
    ],
)
def test_what_a_chat_is_refused_for(client, ask, message):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": USER} | ask)
    assert message in caught.value.body["message"]


def test_another_model(client):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt' here; the one served is 'tiny'"):
        client.completions.create(model="gpt", prompt="hello")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]


@pytest.mark.parametrize(("key", "message"), [("another", "the API key is wrong"), ("", "no API key|the API key is wrong")])
def test_keys(client, address, key, message):
    with pytest.raises(openai.AuthenticationError, match=message) as caught:
        client.with_options(api_key=key or "x").models.list()
    assert caught.value.code == "invalid_api_key"


def got(address, path, *, body=None, key=KEY, kind="application/json"):
    """Status, headers and text."""
    headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(address + path, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.headers, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


def test_health_of_an_engine_that_has_ended(address, monkeypatch):
    monkeypatch.setattr(Engine, "closed", True)
    assert got(address, "/health", key=None)[0] == 503


def test_health_wants_no_key_and_all_else_does(address):
    assert got(address, "/health", key=None)[0] == 200
    for path in ("/metrics", "/v1/models", "/v1/models/tiny"):
        assert got(address, path, key=None)[0] == 401
        assert got(address, path)[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/completions", b"{", 400, "the body is not JSON ("),
        ("/v1/completions", b'{"prompt": "\xff"}', 400, "the body is not JSON (it is not UTF-8, or nested too deeply)"),
        ("/v1/completions", b"[" * 100_000, 400, "the body is not JSON (it is not UTF-8, or nested too deeply)"),
        ("/v1/completions", b"[]", 400, "the body: input should be a valid dictionary"),
        ("/v1/completions", b"{}", 400, "model: field required"),
        ("/v1/completions", None, 405, "Method Not Allowed"),
        ("/v1/embeddings", b"{}", 404, "Not Found"),
    ],
)
def test_errors_have_one_form(address, path, body, status, message):
    found, _, text = got(address, path, body=body)
    assert found == status
    assert message in json.loads(text)["error"]["message"]


def test_a_body_that_does_not_say_what_it_is(address):
    """As curl sends it unless told otherwise."""
    found, _, text = got(address, "/v1/completions", body=b'{"model": "tiny", "prompt": "x"}', kind="application/x-www-form-urlencoded")
    assert found == 400
    assert json.loads(text)["error"]["message"] == "the body was not sent as JSON; send it with Content-Type: application/json"


def test_half_a_body(address, monkeypatch):
    """Else whoever sends one would keep the server from ending."""
    monkeypatch.setattr(_app, "PATIENCE", 0.2)
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100\r\nConnection: close\r\n\r\n{{"
    with socket.create_connection((host, int(port)), timeout=60) as connection, connection.makefile() as reply:
        connection.sendall(head.encode())
        said = reply.read()  # until the server hangs up
    assert said.startswith("HTTP/1.1 408") and "the body was not complete after 0.2 s" in said


def value(address, name):
    """One of the metrics."""
    lines = [line for line in got(address, "/metrics")[2].splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].split()[-1])


def long_stream(client):
    return client.completions.create(model="tiny", prompt="hello", max_tokens=240, logit_bias=ON, stream=True)


def test_too_many_are_told_to_try_again(client, engine):
    streams = [long_stream(client) for _ in range(MAX_OPEN)]
    wait_until(lambda: engine.stats().running + engine.stats().waiting == MAX_OPEN)
    with pytest.raises(openai.RateLimitError, match=f"{MAX_OPEN} answers are under way or wait") as caught:
        client.completions.create(model="tiny", prompt="hello")
    assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 60
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("stream", [False, True])
def test_too_many_at_the_same_moment(engine, monkeypatch, stream):
    """Whoever is let in counts at once, not only when the answer begins."""
    count, stream_all = 4 * MAX_OPEN, engine.stream_all
    app, body = create_app(engine, model="tiny", max_open=MAX_OPEN), json.dumps({**SEEDED, "prompt": "hello", "stream": stream}).encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"content-type", b"application/json")],
        "query_string": b"",
    }
    decided = []

    async def when_all_are(prompts, params):
        decided.append(200)
        while len(decided) < count:
            await asyncio.sleep(0.01)
        async for delta in stream_all(prompts, params):
            yield delta

    async def one():
        start, *_ = [message async for messages in relayed(app, scope, body) for message in messages]
        if start["status"] == 429:
            decided.append(429)
        return start["status"]

    async def every():
        return collections.Counter(await asyncio.gather(*(one() for _ in range(count))))

    monkeypatch.setattr(engine, "stream_all", when_all_are)
    assert asyncio.run(every()) == {200: MAX_OPEN, 429: count - MAX_OPEN}
    decided.clear()
    assert asyncio.run(every()) == {200: MAX_OPEN, 429: count - MAX_OPEN}  # the room was given back


def test_a_client_that_goes_away_frees_its_place(client, address, engine):
    before = value(address, "mkdsl_answer_tokens_total")
    stream = long_stream(client)
    next(iter(stream))
    stream.close()
    wait_until(lambda: engine.stats().running == 0)
    assert value(address, "mkdsl_answer_tokens_total") - before < 240


def test_a_client_that_does_not_wait_for_its_answer(address, engine):
    before = value(address, "mkdsl_answer_tokens_total")
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 240, "logit_bias": ON, "n": 4}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: engine.stats().running)
    wait_until(lambda: engine.stats().running + engine.stats().waiting == 0)
    assert value(address, "mkdsl_answer_tokens_total") - before < 4 * 240


def test_many_clients_at_once(client):
    """Some of whom go away: what the others get is theirs."""
    ask = {"model": "tiny", "max_tokens": 20, "logit_bias": ON}
    expected = [client.completions.create(prompt=f"number {i}", seed=i, **ask).choices[0].text for i in range(4)]

    def one(i):
        if i % 5 == 4:
            stream = long_stream(client.with_options(max_retries=20))
            next(iter(stream))
            return stream.close()
        reply = client.with_options(max_retries=50).completions.create(prompt=f"number {i % 5}", seed=i % 5, **ask)
        assert reply.choices[0].text == expected[i % 5]
        return None

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(20)))


def test_a_step_that_fails(client, engine, monkeypatch):
    backend = engine._loop._backend
    decode, left = backend.decode, [2]

    def fails(lanes, **options):
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("out of luck")
        return decode(lanes, **options)

    monkeypatch.setattr(backend, "decode", fails)
    with pytest.raises(openai.APIError, match="out of luck") as caught:
        list(long_stream(client))
    assert "a step failed on the device" in str(caught.value)
    left[0] = 2
    with pytest.raises(openai.InternalServerError, match="out of luck"):
        client.completions.create(model="tiny", prompt="hello", max_tokens=200, logit_bias=ON)
    monkeypatch.undo()
    assert client.completions.create(model="tiny", prompt="hello").choices
    assert issubclass(EngineError, RuntimeError)


def test_metrics(client, address):
    names = ("mkdsl_answer_tokens_total", "mkdsl_prompt_tokens_total", "mkdsl_time_to_first_token_seconds_count",
             "mkdsl_time_per_token_seconds_count", 'mkdsl_requests_total{path="/v1/completions",status="200"}',
             'mkdsl_requests_total{path="other",status="404"}')  # fmt: skip
    got(address, "/nowhere")
    client.completions.create(model="tiny", prompt="hello")
    before = {name: value(address, name) for name in names}
    client.completions.create(model="tiny", prompt="hello", max_tokens=30, logit_bias=ON)
    got(address, "/nowhere/else")
    assert {name: value(address, name) - before[name] for name in names} == dict(zip(names, (30, 6, 1, 1, 1, 1), strict=True))
    assert (value(address, "mkdsl_running"), value(address, "mkdsl_waiting")) == (0, 0)
    assert value(address, "mkdsl_pages") == value(address, "mkdsl_free") == 16
