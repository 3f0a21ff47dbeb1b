"""`mkdsl serve`, as a process."""

import concurrent.futures
import contextlib
import functools
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import openai
import pytest
from typer.testing import CliRunner

from mkdsl import engine, serve
from mkdsl.engine._cli import app

ROOT = pathlib.Path(__file__).parents[2]


def run(monkeypatch, capsys, *arguments):
    """The command's exit status and what it says."""
    monkeypatch.setattr(sys, "argv", ["mkdsl", *arguments])
    with pytest.raises(SystemExit) as done:
        serve.main()
    return done.value.code, "".join(capsys.readouterr())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_another_address_wants_a_key(monkeypatch, capsys, host):
    monkeypatch.delenv("MKDSL_API_KEY", raising=False)
    code, said = run(monkeypatch, capsys, "serve", "nowhere", "--host", host)
    assert code == 2
    assert f"{host} can be reached from other machines; give --api-key (or MKDSL_API_KEY), or listen at 127.0.0.1" in said


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_this_machines_own_wants_none(monkeypatch, capsys, host):
    code, said = run(monkeypatch, capsys, "serve", "nowhere", "--port", "0", "--host", host)
    assert code == 1
    assert "nowhere" in said and "there is no such directory" in said


def test_a_port_that_another_has(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        code, said = run(monkeypatch, capsys, "serve", "nowhere", "--port", str(other.getsockname()[1]))
    assert code == 2
    assert "cannot be had (Address already in use); give another one" in said


def test_another_address_with_a_key(monkeypatch, capsys):
    monkeypatch.setenv("MKDSL_API_KEY", "a key")
    assert run(monkeypatch, capsys, "serve", "nowhere", "--port", "0", "--host", "0.0.0.0")[0] == 1


@pytest.mark.parametrize("batch", ["0", "3", "17"])
def test_batches_that_there_are_not(monkeypatch, capsys, batch):
    code, said = run(monkeypatch, capsys, "serve", "nowhere", "--max-batch", batch)
    assert code == 2
    assert f"{batch} is none of 1, 2, 4, 8, 16" in said


@pytest.mark.parametrize("deadline", ["0", "1e6", "inf", "nan"])
def test_deadlines_that_no_kernel_has(monkeypatch, capsys, deadline):
    code, said = run(monkeypatch, capsys, "serve", "nowhere", "--deadline", deadline)
    assert code == 2
    assert "Invalid value for '--deadline'" in said


def test_without_the_extra(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("mkdsl.serve._", "uvicorn"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, said = run(monkeypatch, capsys, "serve", "nowhere")
    assert code == 1
    assert 'the package uvicorn is not installed: pip install "mkdsl[serve]"' in said


def test_the_other_commands_are_there_too(monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, "--help")
    assert code == 0
    assert {"generate", "explain", "probe", "serve"} <= set(said.split())
    assert engine.main is not serve.main


@contextlib.contextmanager
def process(directory, name, *options):
    """The command serving a checkpoint at some port: the process, and a client of it."""
    command = [
        sys.executable,
        "-c",
        "from mkdsl.serve import main; main()",
        "serve",
        str(directory),
        "--port",
        "0",
        "--name",
        name,
        *options,
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as serving:
        assert serving.stderr is not None
        try:
            address = next(re.findall(r"http://\S+?/v1", line)[0] for line in serving.stderr if "http://" in line)
            with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=300) as client:
                yield serving, client
        finally:
            serving.send_signal(signal.SIGTERM)
            assert serving.wait(60) == 0, serving.stderr.read()


@pytest.mark.slow
@pytest.mark.medium
def test_sigterm_drains(session_checkpoint):
    """The answers that have begun are completed, and then the process ends with 0."""
    with process(session_checkpoint, "tiny", "--max-batch", "1", "--context", "256") as (serving, client):
        ask = {"model": "tiny", "prompt": "hello", "max_tokens": 240, "logit_bias": {"257": -100}}
        stream = iter(client.completions.create(stream=True, **ask))
        chunks = [next(stream)]
        serving.send_signal(signal.SIGTERM)
        chunks += stream
        assert chunks[-1].choices[0].finish_reason == "length"
        serving.wait(60)


@pytest.mark.slow
def test_sigterm_as_soon_as_it_announces_itself(session_checkpoint):
    with process(session_checkpoint, "tiny", "--max-batch", "1", "--context", "256"):
        pass


@pytest.mark.slow
def test_half_a_request_does_not_keep_it_from_ending(session_checkpoint):
    with process(session_checkpoint, "tiny", "--max-batch", "1", "--context", "256", "--drain", "1") as (_, client):
        connection = socket.create_connection((client.base_url.host, client.base_url.port))
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    connection.close()


@pytest.mark.slow
def test_smollm2():
    """A real model: it says what `mkdsl generate` says, alone and in company, whole and in a stream."""
    questions = [[{"role": "user", "content": f"What is the capital of {country}?"}] for country in ("France", "Italy", "Japan", "Spain")]
    with process(engine.fetch_smollm2(), "smollm2", "--max-batch", "4", "--context", "256") as (_, client):
        ask = functools.partial(client.chat.completions.create, model="smollm2", temperature=0, max_tokens=32)
        alone = [ask(messages=messages).choices[0].message.content for messages in questions]
        command = ["generate", engine.fetch_smollm2(), "--chat", "--context", "256", "--max-tokens", "32"]
        assert alone == [CliRunner().invoke(app, [*map(str, command), "--prompt", m["content"]]).stdout[:-1] for (m,) in questions]
        assert "Paris" in alone[0]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            together = pool.map(
                lambda messages: "".join(c.choices[0].delta.content for c in ask(messages=messages, stream=True)), questions
            )
        assert list(together) == alone
        reply = ask(messages=questions[0], n=2, temperature=1, seed=1, logprobs=True, top_logprobs=3)
        for choice in reply.choices:
            text = b"".join(bytes(one.bytes) for one in choice.logprobs.content if one.bytes).decode()
            assert text == choice.message.content
