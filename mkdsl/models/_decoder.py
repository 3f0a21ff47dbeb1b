"""Decoders of the Llama and Qwen3 families in the DSL: one token of one sequence, in plain JAX plus mkdsl's operators.

Both families are pre-norm transformers with rotary grouped-query attention and a SwiGLU MLP; Qwen3 also normalises each head of q and k.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import mkdsl.ops as mk
from mkdsl.models._config import DecoderConfig

DecodeStep = Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array, Any]]


@mk.tile
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, elementwise in float32."""
    return gate * jax.nn.sigmoid(gate) * up


@functools.cache  # one function per shape, so that what JAX compiled for it is found again
def decode_step(config: DecoderConfig) -> DecodeStep:
    """The decode step of a model.

    Args:
      config: its shape.

    Returns:
      f(params, kv, token, pos) -> (next token, logits, kv), where params are as in `abstract_params`, kv as in `init_cache`, token and
      pos int32 scalars, and logits [vocab] float32. `mk.jit`, `jax.jit`, `jax.vmap` and `mk.prefill` apply to it.
    """

    def split(weight: jax.Array, h: jax.Array, count: int, norm: jax.Array | None) -> jax.Array:
        x = mk.heads(mk.linear(weight, h), count)
        return x if norm is None else mk.rms_norm(x, norm, eps=config.eps)

    def layer(x: jax.Array, p: Any, kv: Any, pos: jax.Array) -> tuple[jax.Array, Any]:
        h = mk.rms_norm(x, p["input_norm"], eps=config.eps)
        q = mk.rope(split(p["wq"], h, config.heads, p.get("q_norm")), pos, theta=config.theta, scaling=config.scaling)
        k = mk.rope(split(p["wk"], h, config.kv_heads, p.get("k_norm")), pos, theta=config.theta, scaling=config.scaling)
        v = mk.heads(mk.linear(p["wv"], h), config.kv_heads)
        kv = mk.append(kv, k, v, pos)
        x = x + mk.linear(p["wo"], mk.attention(q, kv, pos))
        h = mk.rms_norm(x, p["post_norm"], eps=config.eps)
        return x + mk.linear(p["wd"], swiglu(mk.linear(p["wg"], h), mk.linear(p["wu"], h))), kv

    def step(params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        x = mk.embed(params["embed"], token)
        x, kv = mk.layers(layer, x, params["layers"], kv, pos)
        logits = mk.linear(params.get("lm_head", params["embed"]), mk.rms_norm(x, params["norm"], eps=config.eps))
        return mk.argmax(logits), logits, kv

    return step


def abstract_params(config: DecoderConfig, dtype: DTypeLike = jnp.bfloat16) -> Any:
    """The parameters as `jax.ShapeDtypeStruct`s: enough to compile a model without its weights.

    Args:
      config: the model's shape.
      dtype: of every leaf.

    Returns:
      {embed [vocab, hidden], layers: {input_norm, wq, wk, wv, wo, post_norm, wg, wu, wd and for Qwen3 q_norm, k_norm, each
      [layers, ...]}, norm [hidden], and lm_head [vocab, hidden] unless tied to embed}. Weights are [out, in].
    """
    hidden, inner, q, kv = config.hidden, config.intermediate, config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer = {
        "input_norm": (hidden,),
        "wq": (q, hidden),
        "wk": (kv, hidden),
        "wv": (kv, hidden),
        "wo": (hidden, q),
        "post_norm": (hidden,),
        "wg": (inner, hidden),
        "wu": (inner, hidden),
        "wd": (hidden, inner),
    }
    layer |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)} if config.qk_norm else {}
    ends = {"embed": (config.vocab, hidden), "norm": (hidden,)} | ({} if config.tied else {"lm_head": (config.vocab, hidden)})
    leaf = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    return {name: leaf(shape) for name, shape in ends.items()} | {"layers": {k: leaf((config.layers, *s)) for k, s in layer.items()}}


def random_params(config: DecoderConfig, key: jax.Array, dtype: DTypeLike = jnp.bfloat16) -> Any:
    """Random parameters, structured as `abstract_params`, under which activations and logits stay of order one.

    Args:
      config: the model's shape.
      key: a `jax.random` key.
      dtype: of every leaf.

    Returns:
      Matrices of normal numbers over sqrt(in), and norm weights around one.
    """
    leaves, structure = jax.tree.flatten_with_path(abstract_params(config, dtype))
    keys = jax.random.split(key, len(leaves))
    drawn = [_draw(k, shape=s.shape, dtype=s.dtype, norm="norm" in path[-1].key) for k, (path, s) in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "norm"))
def _draw(key: jax.Array, *, shape: tuple[int, ...], dtype: DTypeLike, norm: bool) -> jax.Array:
    x = jax.random.normal(key, shape, dtype)  # drawn in its dtype: a float32 copy of a large model would not fit beside it
    return 1 + 0.1 * x if norm else x * shape[-1] ** -0.5


def init_cache(config: DecoderConfig, context: int, *, batch: int | None = None, dtype: DTypeLike = jnp.bfloat16) -> Any:
    """An empty KV cache.

    Args:
      config: the model's shape.
      context: how many positions it holds.
      batch: how many sequences; None for one, without a batch axis.
      dtype: of both leaves.

    Returns:
      {"k", "v"}, each [layers, kv_heads, context, head_dim], with a leading [batch] if given.
    """
    shape = (config.layers, config.kv_heads, context, config.head_dim)
    shape = shape if batch is None else (batch, *shape)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}
