"""Decoders that the grammar draws, as kernels: they have schedules, are emitted for a GPU, and interpreted they compute what the phases do when they
are evaluated in numpy, and what is meant."""

import dataclasses

import jax
import numpy as np
import pytest
from grammar.decoders import Decoder, decoder
from grammar.expressions import jumps
from grammar.families import FAMILIES
from grammar.law import TOKEN, drawn, is_within_the_language
from grammar.phases import Cuts
from grammar.spec import Spec
from grammar.three_ways import BFLOAT16, REAL, ROUNDED, Ways, difference, graph_of
from interpreted import SMALL

import mkdsl as mk
from mkdsl.gpu import Traced

pytestmark = [pytest.mark.medium, pytest.mark.usefixtures("race_detector")]

KINDS = sorted(set(FAMILIES) - {"refused"})


def is_smooth(spec: Spec) -> bool:
    return is_within_the_language(spec) and not jumps(dataclasses.astuple(spec))


def traced(d: Decoder, batch: int) -> Traced:
    kv = jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch, *a.shape), a.dtype), d.kv)
    scalars = jax.ShapeDtypeStruct((batch,), np.int32)
    return mk.jit(d.step, batch=batch, target=SMALL).trace(d.params, kv, scalars, scalars)


@pytest.mark.parametrize("kind", KINDS)
def test_they_have_schedules(kind):
    """Which the search proves."""
    for spec in drawn(kind, 3, is_within_the_language):
        traced(decoder(spec), 3).schedule()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_emitted(kind):
    for spec in drawn(kind, 5, is_within_the_language):
        assert traced(decoder(spec), 2).lower().emitted


def check(spec: Spec, positions: tuple[int, ...] = (5, 63)) -> None:
    """A sequence at each position."""
    d = decoder(spec)
    graph = graph_of(d)
    assert graph is not None
    kv = jax.tree.map(lambda a: np.stack([a] * len(positions)), d.kv)
    step = mk.jit(d.step, batch=len(positions), target=SMALL, interpret=True)
    outs = jax.tree.leaves(step(d.params, kv, np.full(len(positions), TOKEN, np.int32), np.asarray(positions, np.int32)))
    for i, pos in enumerate(positions):
        ways = Ways(d, TOKEN, pos)
        for n, (out, phases, want) in enumerate(zip(outs, ways.phases(graph, ROUNDED, Cuts()), ways.plain(REAL), strict=True)):
            if phases.dtype.kind == "f":
                off, meant = (difference(np.asarray(out[i], np.float32), a) for a in (phases, want))
                assert off < 2 * BFLOAT16, f"output {n} at {pos=}: the kernel is off by {off} from the phases"
                assert meant < 8 * BFLOAT16, f"output {n} at {pos=}: the kernel is off by {meant}"


SOME = {
    "a stream handed on": Spec(context=64, stacks=(1,), residual="delayed", mlp="none", out=("norm", "l2", "x")),
    "heads of three kinds": Spec(context=64, stacks=(1,), mlp="none", head_norm="std", heads=3, kv_heads=3, bias="matrix", append=("%", "pos", 7), attend=63),
    "a fold of one's own": Spec(stacks=(), fold="range", after=("mul", ("norm", "std", "x")), extra=("hidden", "embedding")),
    "results of all kinds": Spec(stacks=(), after=("+", "x", ("row", "pos")), extra=("probabilities", "token", "narrow", "next position")),
}  # fmt: skip


LONG = ("a stream handed on", "heads of three kinds")


@pytest.mark.parametrize(
    "spec", [pytest.param(spec, id=name, marks=[pytest.mark.slow] if name in LONG else []) for name, spec in SOME.items()]
)
def test_some_kernels_compute_what_is_meant(spec):
    check(spec)


def test_a_rotation_past_a_cache_that_is_attended_in_part():
    """Regression: it was by the cache's last position."""
    check(Spec(context=64, stacks=(1,), mlp="none", attend=("min", "pos", 62)), positions=(100,))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_compute_what_is_meant(kind):
    for spec in drawn(kind, 5, is_smooth):
        check(spec)
