"""Layers in a row, tile functions by name, and prefill: transformations of a decoder rather than operators."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from mkdsl.ops._operator import Sharing, require, shared_cache
from mkdsl.ops._paged import with_tables_of, without_tables


def layers(layer: Callable[..., tuple[jax.Array, Any]], x: jax.Array, params: Any, kv: Any, *rest: Any) -> tuple[jax.Array, Any]:
    """Applies `layer(x, p, kv, *rest) -> (x, kv)` once per layer, like `lax.scan` over the leading axis of `params` and `kv`.

    Args:
      layer: one decoder layer for one token.
      x: [hidden].
      params: a pytree whose leaves start with the layer axis.
      kv: the cache, likewise; of `mk.Paged` the pages: all layers have the same table.
      *rest: handed to every layer unchanged, such as `pos`.

    Returns:
      x after the last layer, and the cache.

    Raises:
      ValueError: the leaves disagree about the number of layers.
    """
    stacked, put_back = without_tables(kv), with_tables_of(kv)
    counts = {leaf.shape[:1] for leaf in jax.tree.leaves((params, stacked))}
    require(
        len(counts) == 1,
        "layers",
        f"leaves of params and kv start with axes {sorted(counts)}",
        "stack every leaf over the same number of layers",
    )

    def one(x: jax.Array, p_kv: Any) -> tuple[jax.Array, Any]:
        x, kv = layer(x, p_kv[0], put_back(p_kv[1]), *rest)
        return x, without_tables(kv)

    x, out = lax.scan(one, x, (params, stacked))
    return x, put_back(out)


def tile[**P, R](f: Callable[P, R]) -> Callable[P, R]:
    """Names a pure tile-level function: elementwise jnp over features. The name is what schedules and errors show."""
    return jax.jit(f)


def prefill(decode_step: Callable[..., Any], *, ascending: bool = False) -> Callable[..., Any]:
    """The decode step over all the tokens of one sequence at once: `f(params, kv, tokens [n], positions [n])`.

    The same function, vmapped over tokens that share one cache: each layer appends every token before any of them attends, and each
    attends up to its own position. A position past the cache writes nothing, so prompts can be padded with such positions. Returns
    what the decode step returns, with a leading token axis on everything but the cache; the decode step must return its cache last.

    Args:
      decode_step: f(params, kv, token, pos) -> (..., kv).
      ascending: positions go up by one, pads come last, and the decode step attends at them as they are. A GPU is faster for knowing it; where it
        is not so, results there are NaN.

    The function raises ValueError where the decode step returns something else than a tuple with its cache last.
    """

    def all_tokens(params: Any, kv: Any, tokens: jax.Array, positions: jax.Array) -> Any:
        with shared_cache(Sharing(ascending)):
            outs = jax.eval_shape(decode_step, params, kv, tokens[0], positions[0])
            last = isinstance(outs, tuple) and jax.tree.structure(outs[-1:]) == jax.tree.structure((kv,))
            require(last, "prefill", f"the decode step returns {jax.tree.structure(outs)}", "return a tuple with its cache last")
            axes = (*(0 for _ in outs[:-1]), None)
            return jax.vmap(decode_step, (None, None, 0, 0), axes)(params, kv, tokens, positions)

    return all_tokens
