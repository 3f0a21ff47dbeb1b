"""Every decoder of the grammar is computed as its plain meaning says, or refused when it is traced, with the user's line.

Phases are evaluated in numpy, twice: in real numbers, where they must be what is meant, and rounded as a kernel rounds. What stands for the plain
meaning is an evaluator of jaxprs in numpy, since XLA would compile for an hour; it is held against `jax.jit` on a sample.
"""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from elementwise import FUNCTIONS
from grammar.decoders import decoder
from grammar.expressions import ACTIVATIONS, BINARY, NORMS, WHOLE, jumps
from grammar.families import FAMILIES
from grammar.law import TOKEN, computed_or_refused, drawn, law
from grammar.phases import Cuts
from grammar.plain import Plain
from grammar.spec import Spec
from grammar.three_ways import REAL, ROUNDED, Ways, difference

from mkdsl.graph._elementwise import COMPOSED

pytestmark = pytest.mark.medium

EXAMPLES = 100  # of each kind; hypothesis repeats some


@pytest.mark.parametrize("kind", FAMILIES)
def test_computed_or_refused(kind, record_property):
    holds, programs = law(kind, EXAMPLES)
    holds()
    counts = collections.Counter(programs.values())
    record_property("decoders", {"kind": kind, "programs": len(programs), **{c: counts[c] for c in ("computed", "refused")}})
    assert len(programs) >= EXAMPLES // 2


def everywhere(name: str) -> Spec:
    """A function of features in a prologue, in epilogues and on heads."""
    e = (name, "x", "x") if name in BINARY else (name, "x")
    return Spec(attended=e, inner=e, query="x" if name in WHOLE else e, values=e if name not in WHOLE else "x", after=e, stacks=(1,))


NAMES = sorted({*FUNCTIONS, *ACTIVATIONS, *BINARY, *WHOLE})


def test_each_function_is_computed_everywhere(record_property):
    for name in NAMES:
        assert computed_or_refused(everywhere(name), Cuts(rows=16, split_k=2, splits=2), [63]) == "computed", name
    record_property("decoders", {"kind": "each function", "programs": len(NAMES), "computed": len(NAMES), "refused": 0})


@pytest.mark.parametrize("name", sorted(set(COMPOSED) - {"is_finite"}))
def test_a_wrong_function_is_found(name, monkeypatch):
    """Of those that primitives are composed of."""
    right = COMPOSED[name]
    monkeypatch.setitem(COMPOSED, name, lambda *args: right(*(1.3 * a for a in args)))
    with pytest.raises(AssertionError):
        computed_or_refused(everywhere(name), Cuts(), [63])


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - {"refused"}))
def test_the_plain_meaning_is_what_jax_computes(kind):
    """Jitted, in float32."""
    (spec,) = drawn(kind, 1, lambda spec: True)
    d = decoder(spec)
    float32 = jax.tree.map(lambda a: a if a.dtype == np.int32 else a.astype(np.float32), (d.params, d.kv))
    want = jax.tree.leaves(jax.jit(d.step)(*float32, np.int32(TOKEN), np.int32(35)))
    for got, expected in zip(Ways(d, TOKEN, 35).plain(REAL), want, strict=True):
        assert difference(got, np.asarray(expected)) < (0.05 if jumps(dataclasses.astuple(spec)) else 1e-4), spec


VECTOR = np.linspace(-3, 3, 64, dtype=np.float32)
FEATURES = {**FUNCTIONS, **ACTIVATIONS, **WHOLE, **{f"{name} norm": lambda x, f=f: f(x, 1 + 0.1 * x, x) for name, f in NORMS.items()}}


@pytest.mark.parametrize("name", sorted(FEATURES))
def test_functions_of_features_are_what_jax_computes(name):
    (got,) = Plain(ROUNDED).closed(jax.make_jaxpr(FEATURES[name])(VECTOR), [VECTOR])
    np.testing.assert_allclose(got, FEATURES[name](jnp.asarray(VECTOR)), rtol=2e-5, atol=2e-6)


FOUND = {
    "the square of a normed vector lost one of its two scales": Spec(into=("mul", "x")),
    "a constant vector of NaN, as jnp.std has, was none": Spec(heads=4, head_norm="std"),
    "a scan inside a scan of one step was accepted": Spec(stacks=(1,), forbidden=("scan in scan", "first")),
    "a stream that hands on what another one was was not computed": Spec(residual="delayed", mlp="none", out=("norm", "l2", "x")),
    "heads were rotated by halves as if they were whole": Spec(turned="halves"),
    "weights of one number a head were refused when kernels were generated": Spec(heads=3, bias="numbers"),
    "a cache was appended to at two positions": Spec(again="appended"),
}


@pytest.mark.parametrize("spec", FOUND.values(), ids=FOUND)
def test_found(spec):
    """Regressions: what the grammar found, at its smallest."""
    computed_or_refused(spec, Cuts(), [5, 70])
