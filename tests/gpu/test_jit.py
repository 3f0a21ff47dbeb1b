"""`mk.jit`: its stages, and what it refuses."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mkdsl as mk
from mkdsl.gpu import Compiled, ContextError, Lowered, TokenError, has_gpu
from mkdsl.lower import lower
from mkdsl.schedule import Schedule, profile

SMALL = dataclasses.replace(profile("H200"), name="h200 with 2 SMs", workers=2)


def step(params, kv, token, pos):
    x = mk.embed(params["embed"], token)
    q, k = (mk.heads(mk.linear(params[n], x), 1) for n in ("wq", "wk"))
    kv = mk.append(kv, k, k, pos)
    logits = mk.linear(params["embed"], x + mk.linear(params["wo"], mk.attention(q, kv, pos)))
    return mk.argmax(logits), logits, kv


def arguments(batch=None):
    def draw(i, *shape):
        return (jax.random.normal(jax.random.key(i), shape) * shape[-1] ** -0.5).astype(jnp.bfloat16)

    lead = () if batch is None else (batch,)
    params = {"embed": draw(0, 64, 64), "wq": draw(1, 64, 64), "wk": draw(2, 64, 64), "wo": draw(3, 64, 64)}
    kv = {n: jnp.zeros((*lead, 1, 64, 64), jnp.bfloat16) for n in "kv"}
    return params, kv, np.full(lead, 3, np.int32), np.full(lead, 5, np.int32)


@pytest.mark.medium
@pytest.mark.usefixtures("race_detector")
def test_stages():
    traced = mk.jit(step, target=SMALL, interpret=True).trace(*arguments())
    assert [p.kind for p in traced.graph.phases] == ["fold", "attention", "fold", "fold"]
    schedule = traced.schedule()
    assert isinstance(schedule, Schedule)
    assert Schedule.from_json(schedule.to_json()) == schedule
    compiled = traced.lower(schedule=schedule).compile()
    got, want = compiled(*arguments()), jax.jit(step)(*arguments())
    np.testing.assert_allclose(got[1], want[1], atol=2e-2)
    assert int(got[0]) == int(want[0])


def test_stages_print_as_one_line_that_says_what_they_are():
    traced = mk.jit(step, target=SMALL).trace(*arguments())
    assert str(traced) == repr(traced) == "<Traced decode step for h200 with 2 SMs, 2 workers: 4 phases, batch 1, context 64>"
    assert repr(traced.graph) == "<OpGraph of 4 phases in 1 segments, 5 tensors, context 64>"
    program: Any = lower(traced.graph, traced.schedule(), SMALL, traced.tree)
    assert str(program) == f"<Program in mega form of {traced.schedule()!r}>"
    lowered = Lowered(program, traced.signature, emitted=None)  # pyright: ignore[reportArgumentType]
    assert str(lowered) == f"<Lowered mega kernel of {traced.schedule()!r}>"
    assert len(str(lowered)) < 200 and "\n" not in str(lowered)
    assert str(Compiled(step, traced.signature, 64, 64)) == "<Compiled decode step: 4 arrays of params, context 64, 64 tokens>"


def test_batch_of_one_with_and_without_its_axis():
    with_axis = mk.jit(step, batch=1, target=SMALL).trace(*arguments(1))
    without = mk.jit(step, batch=1, target=SMALL).trace(*arguments())
    assert with_axis.batched
    assert not without.batched
    assert with_axis.schedule() == without.schedule()


@pytest.mark.parametrize("batch", [None, 2])
def test_the_program_that_notes_times_has_the_same_outputs(batch):
    lowered = mk.jit(step, batch=batch, target="h200").trace(*arguments(batch)).lower()
    plain, (timed, stamps) = (jax.eval_shape(f, *lowered.signature) for f in (lowered.program, lowered.program.timed))
    assert timed == plain
    assert (stamps.shape, stamps.dtype) == ((lowered.program.schedule.workers, 4, 5), jnp.int32)


def test_times_are_noted_in_one_launch_only():
    args = arguments()
    with pytest.raises(ValueError, match="in mega form only, not in phased form"):
        mk.jit(step, target=SMALL, interpret=True).trace(*args).lower().program.timed(*args)


@pytest.mark.parametrize(("batch", "message"), [(0, "batch=0"), (17, "batch=17; a kernel decodes 1 to 16")])
def test_batch_out_of_range(batch, message):
    with pytest.raises(ValueError, match=message):
        mk.jit(step, batch=batch)


@pytest.mark.parametrize("batch", [True, 2.0, "2", [2]])
def test_batch_of_another_type(batch):
    """Regression: True and 2.0 were taken, and "2" was compared with 1."""
    with pytest.raises(TypeError, match=re.escape(f"mk.jit: {batch=}; pass how many sequences a step takes, 1 to 16, or None")):
        mk.jit(step, batch=batch)
    mk.jit(step, batch=np.int64(2))


def test_what_is_no_function():
    with pytest.raises(TypeError, match=r"mk\.jit: 3 is no function; pass f"):
        mk.jit(3)


def returning(results):
    """The step with other results, of (token, logits, kv, pos)."""

    def other(params, kv, token, pos):
        return results(*step(params, kv, token, pos), pos)

    return other


RETURNED = {
    "token and cache": lambda token, logits, kv, pos: (token, kv),
    "logits": lambda token, logits, kv, pos: logits,
    "a dict": lambda token, logits, kv, pos: {"logits": logits, "kv": kv, "next": pos + 1},
    "half of the cache": lambda token, logits, kv, pos: (logits, kv["k"]),
    "other types": lambda token, logits, kv, pos: (
        logits.astype(jnp.bfloat16),
        logits > 0,
        jax.nn.softmax(logits).astype(jnp.float16),
        3,
        2.5,
    ),
    "after the kernel": lambda token, logits, kv, pos: (jnp.where(pos > 3, token, 0), kv["v"] * 2),
    "twice": lambda token, logits, kv, pos: (logits, logits, 2 * logits),
}


@pytest.mark.medium
@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("name", RETURNED)
def test_results_are_those_of_the_step(name, batch):
    """Regression: bfloat16 and booleans came back as float32."""
    f = returning(RETURNED[name])
    lowered = mk.jit(f, batch=batch, target=SMALL, interpret=True).lower(*arguments(batch))
    plain = f if batch is None else jax.vmap(f, (None, 0, 0, 0))
    ours, theirs = jax.eval_shape(lowered.program, *lowered.signature), jax.eval_shape(plain, *arguments(batch))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), ours) == jax.tree.map(lambda a: (a.shape, a.dtype), theirs)


NOT_RETURNED = {
    "nothing": (
        lambda token, logits, kv, pos: None,
        r"test_jit.py:\d+:.*: the decode step returns nothing that a kernel computes; run it with jax.jit",
    ),
    "the cache": (lambda token, logits, kv, pos: kv, "mk.append without an mk.attention over the result"),
    "integers": (
        lambda token, logits, kv, pos: logits.astype(jnp.int32),
        r"the decode step returns int32\[64\] \(map\); it returns float32",
    ),
    "a sum": (lambda token, logits, kv, pos: logits.sum(), r"the decode step returns float32\[\] \(reduce\)"),
    "heads": (lambda token, logits, kv, pos: logits.reshape(2, 32), r"the decode step returns float32\[2, 32\] \(reshape\)"),
}


@pytest.mark.parametrize("name", NOT_RETURNED)
def test_results_that_no_kernel_has(name):
    """Regression: a step that returned its cache alone, or nothing, was a ValueError about an empty max()."""
    results, message = NOT_RETURNED[name]
    with pytest.raises(mk.UnsupportedError, match=message):
        mk.jit(returning(results), target=SMALL).trace(*arguments())


def test_lower_has_emitted_the_kernel(monkeypatch):
    """What fails when a kernel is emitted fails in .lower(), also for a GPU that is not there."""

    def fail(*_):
        raise NotImplementedError("no such instruction")

    for interpret in (False, True):
        traced = mk.jit(step, target=SMALL, interpret=interpret).trace(*arguments())
        monkeypatch.setattr("mkdsl.lower.phases._epilogue.store", fail)
        with pytest.raises(NotImplementedError, match="no such instruction"):
            traced.lower()
        monkeypatch.undo()
        assert "mosaic" in traced.lower().emitted.as_text() or interpret


def test_unknown_target():
    with pytest.raises(ValueError, match="gtx"):
        mk.jit(step, target="gtx 970")


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(RuntimeError, match=r"no GPU.*interpret=True"):
        mk.jit(step)(*arguments())


def test_wrong_batch_axis():
    params, kv, token, pos = arguments()
    with pytest.raises(TypeError, match=r"token has shape \(\) with batch=3"):
        mk.jit(step, batch=3).trace(params, kv, token, pos)
    with pytest.raises(TypeError, match=r"kv\['k'\] has shape \(1, 64, 64\) with batch=3"):
        mk.jit(step, batch=3).trace(params, kv, np.zeros(3, int), np.zeros(3, int))
    paged = mk.Paged(kv, np.zeros((2, 1), np.int32))
    with pytest.raises(TypeError, match=r"kv\.table has shape \(2, 1\) with batch=3; .* a table \[batch, width\]"):
        mk.jit(step, batch=3).trace(params, paged, np.zeros(3, int), np.zeros(3, int))


@pytest.mark.medium
def test_wrong_shape_or_dtype_after_compiling():
    params, kv, token, pos = arguments()
    compiled = mk.jit(step, target=SMALL, interpret=True).lower(params, kv, token, pos).compile()
    with pytest.raises(TypeError, match=r"params\['wq'\] is float32\[64, 64\]; compiled for bfloat16\[64, 64\]"):
        compiled(params | {"wq": params["wq"].astype(jnp.float32)}, kv, token, pos)
    with pytest.raises(ContextError, match="pos=64 with context=64"):
        compiled(params, kv, token, 64)
    for outside in (-1, 64, jnp.int32(64)):
        with pytest.raises(TokenError, match=rf"token={outside} with vocabulary=64; tokens run from 0 to 63"):
            compiled(params, kv, outside, pos)


@pytest.mark.slow
@pytest.mark.medium
@pytest.mark.usefixtures("race_detector")
def test_a_traced_token_is_clamped():
    """As mk.embed says, in the kernel and in the reference."""
    params, kv, _, pos = arguments()
    program = mk.jit(step, target=SMALL, interpret=True).lower(params, kv, 0, pos).program
    for run in (jax.jit(program), jax.jit(step)):
        for token, clamped in ((-1, 0), (64, 63)):
            np.testing.assert_array_equal(run(params, kv, token, pos)[1], run(params, kv, clamped, pos)[1])


@pytest.mark.medium
@pytest.mark.usefixtures("race_detector")
def test_numbers_that_are_no_arrays_yet():
    """Regression: a Python number in params warned of float64, and then had no shape."""

    def scaled(params, kv, token, pos):
        y = mk.linear(params["wq"], mk.embed(params["embed"], token)) * params["scale"] + params["shift"] * params["each"]
        return mk.argmax(y), y, kv

    params = arguments()[0] | {"scale": 1.5, "shift": 2, "each": np.linspace(-1, 1, 64)}
    compiled = mk.jit(scaled, target=SMALL, interpret=True)
    np.testing.assert_allclose(compiled(params, (), 3, 0)[1], jax.jit(scaled)(params, (), 3, 0)[1], atol=2e-2)


def test_float_token():
    params, kv, _, pos = arguments()
    with pytest.raises(TypeError, match="token is float"):
        mk.jit(step).trace(params, kv, np.float32(3), pos)
