"""`mk.jit`: its stages, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mkdsl as mk
from mkdsl.gpu import ContextError, has_gpu
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


@pytest.mark.medium
def test_wrong_shape_or_dtype_after_compiling():
    params, kv, token, pos = arguments()
    compiled = mk.jit(step, target=SMALL, interpret=True).lower(params, kv, token, pos).compile()
    with pytest.raises(TypeError, match=r"params\['wq'\] is float32\[64, 64\]; compiled for bfloat16\[64, 64\]"):
        compiled(params | {"wq": params["wq"].astype(jnp.float32)}, kv, token, pos)
    with pytest.raises(ContextError, match="pos=64 with context=64"):
        compiled(params, kv, token, 64)


def test_float_token():
    params, kv, _, pos = arguments()
    with pytest.raises(TypeError, match="token is float"):
        mk.jit(step).trace(params, kv, np.float32(3), pos)
