"""A kernel's stamps as a timeline. The stamps are the simulator's, as if a kernel had done what it says."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from found import found
from oracle.graphs import tiny
from stamps import stamped, stamps_of

from mkdsl.gpu import measure, measured_timeline
from mkdsl.schedule import profile
from mkdsl.simulate import simulate

H200 = profile("h200")


@pytest.fixture(scope="module")
def played():
    return simulate(tiny(), found(tiny(), 3, H200), H200, whole=True)


def test_stamps_are_the_spans_of_each_worker(played):
    """To the nanosecond, although the clock's 32 bits wrap around in between."""
    stamps = stamps_of(tiny(), played)
    assert stamps.min() < 0 < stamps.max()
    measured = measured_timeline(tiny(), stamps)
    want = {(w, s.phase, s.iteration): s[3:] for s in played.spans for w in played.cohorts[s.cohort]}
    first = min(min(moments) for moments in want.values())
    got = {(s.cohort, s.phase, s.iteration): s[3:] for s in measured.spans}
    assert set(got) == set(want) and measured.cohorts == tuple((w,) for w in range(132))
    assert all(got[key] == pytest.approx([us - first for us in want[key]], abs=2e-3) for key in want)


def test_the_step_and_its_phases_take_what_the_simulator_says(played):
    measured = stamped(tiny(), found(tiny(), 3, H200), H200)
    assert measured.us == pytest.approx(played.us, abs=0.1)
    assert dict(measured.phase_us) == pytest.approx(dict(played.phase_us), abs=0.3)


def test_a_worker_that_skips_a_step_has_no_span_there(played):
    stamps = stamps_of(tiny(), played)
    stamps[5] = 0
    assert 5 not in {s.cohort for s in measured_timeline(tiny(), stamps).spans}


def test_of_several_runs_the_median_counts_and_the_first_does_not():
    """Runs of a program of one phase on one worker, 500, 9, 7, ... us long."""
    graph = types.SimpleNamespace(
        segments=[types.SimpleNamespace(repeats=1, phases=("map",))], phases=[types.SimpleNamespace(name="map")], order={"map": 0}, iterations=lambda p: 1,
        phase=lambda name: types.SimpleNamespace(segment=0),
    )  # fmt: skip
    lengths = iter([500, 9, 7, 8, 100, 6])

    def stamps() -> np.ndarray:
        return np.array([[[1, 1, 1, 1, 1 + 1000 * next(lengths)]]], np.int32)

    def timed(*args: jax.Array) -> tuple[None, jax.Array]:
        return None, jax.pure_callback(stamps, jax.ShapeDtypeStruct((1, 1, 5), jnp.int32))

    program = types.SimpleNamespace(timed=timed, graph=graph)
    assert measure(program, *(jnp.zeros(1),) * 4).us == 8.0  # pyright: ignore[reportArgumentType]
