"""How fast an answer came: sums over deltas, and a clock that does not count what JAX compiles."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import monitoring

from mkdsl.engine import _speed
from mkdsl.engine._speed import Heard, Speed, Stopwatch


def heard(*deltas):
    return [Heard(choice=choice, tokens=tokens, seconds=seconds) for choice, tokens, seconds in deltas]


def test_decode_steps_that_came_with_the_prefill_are_not_its_time():
    speed = Speed.of(101, heard((0, 16, 1.5), (0, 16, 2.0), (0, 14, 2.4375), (0, 0, 9.0)))
    assert (speed.prefill_tokens, speed.first_tokens, speed.decode_tokens, speed.decode_seconds) == (100, 16, 30, 0.9375)
    assert speed.prefill() == "prefill: 100 tokens, 100.0 tokens/s"
    assert speed.decode("kernel") == "decode (kernel): 30 tokens, 32.0 tokens/s"


@pytest.mark.parametrize("tokens", [1, 0])
def test_one_delta_does_not_say_what_its_decode_steps_took(tokens):
    speed = Speed.of(101, heard((0, tokens, 2.0)))
    assert speed.prefill() == "prefill and 1 decode step: 100 tokens, 50.0 tokens/s"
    assert speed.decode("reference") == "decode (reference): too short to time"


def test_nothing_to_prefill():
    assert Speed.of(1, heard((0, 1, 2.0), (0, 1, 3.0))).prefill() == "prefill: too short to time"


@given(st.lists(st.lists(st.tuples(st.integers(1, 16), st.integers(1, 100)), min_size=1), min_size=1, max_size=4))
def test_what_lies_between_two_answers_is_nobodys(answers):
    """Each answer by itself, from its first delta on."""
    deltas, now = [], 0
    for choice, answer in enumerate(answers):
        for tokens, seconds in answer:
            now += seconds
            deltas.append((choice, tokens, float(now)))
        now += 1000
    speed = Speed.of(5, heard(*deltas))
    assert speed.decode_tokens == sum(tokens for answer in answers for tokens, _ in answer[1:])
    assert speed.decode_seconds == sum(seconds for answer in answers for _, seconds in answer[1:])


@pytest.fixture
def clock(monkeypatch):
    """A clock that is put forward by hand."""
    now = [100.0]
    monkeypatch.setattr(_speed.time, "perf_counter", lambda: now[0])

    def passes(seconds, event=None, took=0.0):
        now[0] += seconds
        if event:
            monitoring.record_event_duration_secs(event, took)

    return passes


def test_a_stopwatch_stands_while_something_is_compiled(clock):
    """Traces lie in one another, and each is told of at its end."""
    with Stopwatch() as watch:
        start = watch.now()
        clock(2.0)
        clock(1.0, "/jax/core/compile/jaxpr_trace_duration", 1.0)
        clock(1.0, "/jax/core/compile/jaxpr_trace_duration", 0.5)
        clock(0.0, "/jax/core/compile/jaxpr_trace_duration", 2.5)  # encloses both, and begins before them
        clock(3.0, "/jax/core/compile/backend_compile_duration", 3.0)
        clock(4.0, "/jax/something/else", 4.0)
        assert watch.now() - start == 11.0 - 5.5
    clock(1.0, "/jax/core/compile/backend_compile_duration", 1.0)
    assert watch.now() - start == 12.0 - 5.5  # it does not listen any more


def test_jax_tells_it_what_it_compiles():
    with Stopwatch() as watch:
        jax.block_until_ready(jax.jit(lambda x: jnp.cumsum(x) * 3)(jnp.ones(7)))
        compiled = list(watch._spans)
        jax.block_until_ready(jnp.ones(7) + 1)
    assert compiled and all(a < b for a, b in compiled)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(compiled))
