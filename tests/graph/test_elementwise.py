"""Elementwise primitives: each is known, and is what JAX computes."""

import elementwise
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mkdsl.graph._elementwise import COMPOSED, IDENTITIES, KNOWN, composed

AT = np.asarray([-1e30, -90, -3.5, -2.5, -1, -0.5, -1e-3, -1e-9, 0, 1e-9, 1e-3, 0.25, 0.5, 0.75, 1, 1.5, 2.5, 3, 80, 1e30], np.float32)


def test_each_primitive_has_a_function_here():
    assert set(elementwise.FUNCTIONS) == KNOWN | IDENTITIES | set(COMPOSED)


@pytest.mark.medium
@pytest.mark.parametrize("name", sorted(COMPOSED))
def test_what_is_composed_is_what_jax_computes(name):
    equation = next(e for e in jax.make_jaxpr(elementwise.FUNCTIONS[name])(AT).eqns if e.primitive.name == name)
    args = np.broadcast_arrays(*([AT, AT[:, None] * 0.7] if name == "pow" else [AT]))
    with jax.numpy_dtype_promotion("standard"):
        want = equation.primitive.bind(*map(jnp.asarray, args), **equation.params)
        closed = composed(name, equation.params, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args])
        (got,) = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *map(jnp.asarray, args))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-7 if name == "erfc" else 1e-12)
