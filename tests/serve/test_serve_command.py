"""`mkdsl serve`, as a process."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import openai
import pytest

from mkdsl import engine, serve

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
    code, said = run(monkeypatch, capsys, "serve", "nowhere", "--host", host)
    assert code == 1
    assert "nowhere" in said and "there is no such directory" in said


def test_another_address_with_a_key(monkeypatch, capsys):
    monkeypatch.setenv("MKDSL_API_KEY", "a key")
    assert run(monkeypatch, capsys, "serve", "nowhere", "--host", "0.0.0.0")[0] == 1


@pytest.mark.parametrize("batch", ["0", "3", "17"])
def test_batches_that_there_are_not(monkeypatch, capsys, batch):
    code, said = run(monkeypatch, capsys, "serve", "nowhere", "--max-batch", batch)
    assert code == 2
    assert f"{batch} is none of 1, 2, 4, 8, 16" in said


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


@pytest.mark.medium
def test_sigterm_drains(session_checkpoint):
    """The answers that have begun are completed, and then the process ends with 0."""
    command = [sys.executable, "-c", "from mkdsl.serve import main; main()", "serve", str(session_checkpoint), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "JAX_PLATFORMS": "cpu"}
    limits = ["--max-batch", "2", "--context", "256", "--name", "tiny"]
    with subprocess.Popen([*command, *limits], env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "http://" in line)
        address = re.findall(r"http://\S+?/v1", said)[0]
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60) as client:
            ask = {"model": "tiny", "prompt": "hello", "max_tokens": 240, "logit_bias": {"257": -100}}
            stream = iter(client.completions.create(stream=True, **ask))
            chunks = [next(stream)]
            process.send_signal(signal.SIGTERM)
            chunks += stream
        assert chunks[-1].choices[0].finish_reason == "length"
        assert process.wait(60) == 0, process.stderr.read()
