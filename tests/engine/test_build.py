"""`mkdsl build`: what it makes ahead is what an engine on a GPU asks for, and a second process neither traces nor compiles."""

import dataclasses
import json
import logging
import os
import pickle
import subprocess
import sys

import jax
import pytest
from typer.testing import CliRunner

from mkdsl import gpu, models
from mkdsl.engine import _decoder
from mkdsl.engine._backend import Backend
from mkdsl.engine._build import Order, build
from mkdsl.engine._cli import app
from mkdsl.engine._decoder import decode_steps
from mkdsl.engine._engine import backend_options, pieces_of, pool_of
from mkdsl.proof import Rule, ScheduleError
from mkdsl.schedule import profile

TINY = models.DecoderConfig(
    hidden=64, layers=1, heads=2, kv_heads=1, head_dim=64, intermediate=64, vocab=100, eps=1e-5, theta=1e4, tied=False, max_context=128
)  # fmt: skip
ORDER = Order(config=TINY, target=profile("h200"), context=100, batches=(1,))


class OnGpu:
    """What `_decoder` knows of JAX, on a machine with a GPU."""

    def __getattr__(self, name):
        return (lambda: "gpu") if name == "default_backend" else getattr(jax, name)


@pytest.fixture
def cache(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MKDSL_CACHE", str(tmp_path))
    caplog.set_level(logging.INFO, "mkdsl")
    return tmp_path


@pytest.mark.medium
def test_an_engine_finds_what_was_built(cache, monkeypatch, caplog):
    (built,) = build(ORDER)
    assert not built.there and built.kernel["spill_bytes"] == 0 < built.kernel["code_bytes"]
    assert 0 < built.floor_us < built.predicted_us
    caplog.clear()
    monkeypatch.setattr(_decoder, "jax", OnGpu())
    pieces = pieces_of(TINY, ORDER.target)
    options = backend_options(TINY, pieces, context=100, max_batch=1, free=None, gpu=ORDER.target)
    params = models.random_params(TINY, jax.random.key(0))
    backend = Backend(TINY, params, step_of=decode_steps(TINY, pool_of(options)), **options)
    for call in backend.calls([1], 0):
        call.jitted.__wrapped__._known.clear()
        assert call.export("cuda")
    assert "tracing" not in caplog.text
    (again,) = build(ORDER)
    assert again == dataclasses.replace(built, there=True, seconds=again.seconds)


@pytest.mark.medium
def test_without_what_assembles(cache, monkeypatch):
    monkeypatch.setattr(gpu._compiler, "to_install", lambda: ["a-compiler==1"])
    (built,) = build(ORDER)
    assert built.kernel is None
    assert "a-compiler==1: run `make setup`" in built.unassembled


def test_a_kernel_that_is_emitted_once(cache, caplog):
    def lowered():
        traced = gpu.jit(models.decode_step(TINY), target="h200").trace(*_decoder.shapes(TINY, 128))
        return traced.lower(of=TINY).emitted.as_text()

    assert lowered() == lowered()
    assert caplog.text.count("tracing") == 1


@pytest.mark.parametrize("batch", ["3", "1,", "one", "32", ""])
def test_batches_that_there_are_not(batch):
    said = CliRunner().invoke(app, ["build", "smollm2-135m", "--batch", batch])
    assert said.exit_code == 2
    assert "has other than 1, 2, 4, 8, 16, with commas between" in said.output


def test_what_no_kernel_takes(cache, monkeypatch):
    monkeypatch.setitem(models.SHAPES, "odd", dataclasses.replace(TINY, head_dim=40))
    said = CliRunner().invoke(app, ["build", "odd", "--batch", "1"])
    assert said.exit_code == 1
    assert "mkdsl: " in said.output and "head_dim=40" in said.output


def test_a_refusal_crosses_from_process_to_process():
    refusal = pickle.loads(pickle.dumps(ScheduleError(Rule.ROOM, "batch 16 does not fit")))
    assert (refusal.rule, str(refusal)) == (Rule.ROOM, "batch 16 does not fit")


@pytest.mark.slow
def test_the_command(tmp_path):
    """In processes of its own, and once more."""
    command = [
        sys.executable,
        "-c",
        "import mkdsl.serve; mkdsl.serve.main()",
        "build",
        "smollm2-135m",
        "--batch",
        "1,2",
        "--out",
        str(tmp_path),
    ]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert "built in" in first
    assert "all was there already in" in second


CHILD = """
import json, logging, sys
import jax
from mkdsl.engine import Engine, SamplingParams

logging.basicConfig(stream=sys.stderr, level=logging.INFO)
seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event.split("/")[-1]))
with Engine.load(sys.argv[1], max_batch=1, context=64) as engine:
    ((answer,),) = engine.generate([[5, 6, 7]], SamplingParams(seed=3, max_tokens=6, logprobs=2))
print(json.dumps([answer.tokens, repr(answer.logprobs), seen.count("cache_hits"), seen.count("cache_misses")]))
"""


@pytest.mark.medium
def test_a_second_process_neither_traces_nor_compiles(checkpoint, tmp_path):
    def process():
        env = os.environ | {"MKDSL_CACHE": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", CHILD, checkpoint], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr.count("tracing")

    (*fresh, _, compiled), traced = process()
    (*found, hits, misses), nothing = process()
    assert (traced, nothing) == (3, 0)  # pages cleared, a piece of the prompt, and decode steps
    assert compiled == hits > 0 == misses
    assert fresh == found  # tokens, and log-probabilities to the bit
