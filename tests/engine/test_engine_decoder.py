"""Which of the two ways a decode step runs, and what is refused before there are weights."""

import dataclasses
import types

import pytest

from mkdsl.engine import ContextError, Engine, _decoder
from mkdsl.engine._decoder import LONGEST, Pool, check_context, decode_path, decode_steps
from mkdsl.graph import UnsupportedError
from mkdsl.models import SHAPES
from mkdsl.proof import ScheduleError
from mkdsl.schedule import PROFILES

SMOLLM2 = SHAPES["smollm2-135m"]


@pytest.fixture
def with_a_gpu(monkeypatch):
    """Pretends that there is a GPU, and that it is this one."""

    def pretend(target):
        monkeypatch.setattr(_decoder, "jax", types.SimpleNamespace(**vars(_decoder.jax) | {"default_backend": lambda: "gpu"}))
        monkeypatch.setattr(_decoder, "detect", lambda: target)

    return pretend


def test_which_of_the_two(with_a_gpu):
    assert decode_path() == "reference"
    with_a_gpu(None)
    assert decode_path() == "kernel"


@pytest.mark.parametrize(("changed", "pages", "message"), [({"head_dim": 40}, 64, "head_dim=40"), ({}, 100, "size=100")])
def test_what_a_kernel_does_not_take(with_a_gpu, changed, pages, message):
    with_a_gpu("h200")
    with pytest.raises(UnsupportedError, match=message):
        decode_steps(dataclasses.replace(SMOLLM2, **changed), Pool(count=8, size=pages, width=8))


def test_what_does_not_fit(with_a_gpu):
    with_a_gpu(dataclasses.replace(PROFILES["h200"], smem_bytes=16 << 10))
    with pytest.raises(ScheduleError, match="does not fit"):
        decode_steps(SMOLLM2, Pool(count=8, size=64, width=8))


@pytest.mark.medium
def test_it_is_refused_before_a_weight_is_read(checkpoint, with_a_gpu):
    (checkpoint / "model.safetensors").write_bytes(b"")
    with_a_gpu("h200")
    with pytest.raises(UnsupportedError, match="head_dim=8; kernels have heads of 64 to 256"):
        Engine.load(checkpoint, max_batch=1)


@pytest.mark.parametrize("context", [0, -64, LONGEST + 64, 640_000_000])
def test_contexts_that_there_are_not(context):
    with pytest.raises(ContextError, match=f"a context of {context} positions; it may have 1 to {LONGEST}"):
        check_context(context)


def test_a_model_made_for_more_than_there_is():
    check_context(LONGEST, most=10**9)
    with pytest.raises(ContextError, match=f"it may have 1 to {LONGEST}"):
        check_context(LONGEST + 1, most=10**9)
