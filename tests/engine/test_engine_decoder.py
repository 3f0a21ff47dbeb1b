"""Which of the two ways a decode step runs, and what is refused before there are weights."""

import dataclasses
import functools
import types

import pytest

from mkdsl import engine, gpu
from mkdsl.engine import ContextError, _decoder, load_model
from mkdsl.engine._decoder import LONGEST, check_context, default_decoder, shapes
from mkdsl.graph import UnsupportedError
from mkdsl.models import SHAPES, decode_step
from mkdsl.proof import ScheduleError
from mkdsl.schedule import PROFILES

SMOLLM2 = SHAPES["smollm2-135m"]


@pytest.fixture
def with_a_gpu(monkeypatch):
    """Pretends that there is a GPU, and that this compiles for it."""

    def pretend(jit):
        monkeypatch.setattr(_decoder, "jax", types.SimpleNamespace(**vars(_decoder.jax) | {"default_backend": lambda: "gpu"}))
        monkeypatch.setattr(_decoder, "jit", jit)

    return pretend


def test_the_reference_elsewhere():
    assert default_decoder(SMOLLM2, 512).path == "reference"


def test_a_kernel_is_compiled_from_shapes_where_there_is_a_gpu(with_a_gpu):
    asked = []

    def jit(step):
        lowered = types.SimpleNamespace(compile=lambda: "a kernel")
        return types.SimpleNamespace(trace=lambda *args: types.SimpleNamespace(lower=lambda of: asked.append((step, args, of)) or lowered))

    with_a_gpu(jit)
    assert default_decoder(SMOLLM2, 512) == engine.Decoder("a kernel", "kernel")
    assert asked == [(decode_step(SMOLLM2), shapes(SMOLLM2, 512), SMOLLM2)]


@pytest.mark.parametrize(("changed", "context", "message"), [({"head_dim": 40}, 512, "head_dim=40"), ({}, 100, "context=100")])
def test_what_a_kernel_does_not_take(with_a_gpu, changed, context, message):
    with_a_gpu(functools.partial(gpu.jit, target="h200"))
    with pytest.raises(UnsupportedError, match=message):
        default_decoder(dataclasses.replace(SMOLLM2, **changed), context)


def test_what_does_not_fit(with_a_gpu):
    with_a_gpu(functools.partial(gpu.jit, target=dataclasses.replace(PROFILES["h200"], smem_bytes=16 << 10)))
    with pytest.raises(ScheduleError, match="does not fit"):
        default_decoder(SMOLLM2, 512)


@pytest.mark.medium
def test_it_is_refused_before_a_weight_is_read(checkpoint, with_a_gpu):
    (checkpoint / "model.safetensors").write_bytes(b"")
    with_a_gpu(functools.partial(gpu.jit, target="h200"))
    with pytest.raises(UnsupportedError, match="head_dim=8; kernels have heads of 64 to 256"):
        load_model(checkpoint)


@pytest.mark.parametrize("context", [0, -64, LONGEST + 64, 640_000_000])
def test_contexts_that_there_are_not(context):
    with pytest.raises(ContextError, match=f"a context of {context} positions; it may have 1 to {LONGEST}"):
        check_context(context)


def test_a_model_made_for_more_than_there_is():
    check_context(LONGEST, most=10**9)
    with pytest.raises(ContextError, match=f"it may have 1 to {LONGEST}"):
        check_context(LONGEST + 1, most=10**9)
