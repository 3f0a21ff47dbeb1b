"""Attention of many tokens of one sequence at once: what `mk.attention` is under `mk.prefill`. Scores of all of them are never in memory."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

from mkdsl.ops._operator import Operator, in_front

BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Causal(Operator):
    """Causal attention of b sequences, n tokens of each.

    q [b, n, heads, head_dim], k and v [b, kv_heads, context, head_dim], positions [b, n] -> [b, n, heads * head_dim] float32. The tokens' own keys
    and values are in the cache already. On a GPU cuDNN computes it, where it takes the shapes.

    Attributes:
      one: the Attention of a single token.
      ascending: the tokens stand side by side, pads last.
      block: positions whose scores are there at the same time, where cuDNN does not compute it.
    """

    one: Any
    ascending: bool = False
    block: int = BLOCK

    def reference(self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
        return (jax.vmap(functools.partial(blocked, self.one, block=self.block))(q, k, v, positions),)

    def on_cuda(self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
        if self.one.softcap is not None or k.dtype not in (jnp.bfloat16, jnp.float16):
            return self.reference(q, k, v, positions)
        attend = side_by_side if self.ascending and self.one.window is None else anywhere
        try:
            return (attend(self.one, q, k, v, positions),)
        except NotImplementedError:  # cuDNN's word for shapes that it does not take
            return self.reference(q, k, v, positions)

    def batched(self, args: Any, axes: Any) -> Any:
        """More sequences: their axis becomes part of the first."""
        front = in_front(args, axes)
        (out,) = self.bind(*(a.reshape(-1, *a.shape[2:]) for a in front))
        return (out.reshape(*front[0].shape[:2], *out.shape[1:]),), (0,)


def blocked(one: Any, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, *, block: int) -> jax.Array:
    """One sequence's attention, folded over blocks of the positions that any token attends to: [n, heads * head_dim] float32.

    Args:
      one: the Attention of a single token.
      q: [n, heads, head_dim].
      k, v: [kv_heads, context, head_dim].
      positions: int32 [n], in any order; one past the cache gives NaN.
      block: how many of them at a time.
    """
    kv_heads, context, head_dim = k.shape
    grouped, block = q.reshape(q.shape[0], kv_heads, -1, head_dim), min(block, context)
    inside = positions < context
    first = 0 if one.window is None else jnp.maximum(jnp.where(inside, positions, context).min() - one.window + 1, 0) // block
    end = -(-(jnp.where(inside, positions, -1).max() + 1) // block)

    def fold(i: jax.Array, carry: Any) -> Any:
        start = jnp.minimum(i * block, context - block)  # the last block may reach into the one before, which has counted
        at = start + jnp.arange(block)
        keep = (at >= i * block) & (at <= positions[:, None])
        if one.window is not None:
            keep &= at > positions[:, None] - one.window
        here = (lax.dynamic_slice_in_dim(a, start, block, 1) for a in (k, v))
        return jax.vmap(one.step, (0, None, None, 0, 0))(carry, *here, grouped, keep)

    carry = jax.tree.map(lambda a: jnp.broadcast_to(a, (q.shape[0], *a.shape)), one.init(*grouped.shape[1:]))
    out = one.finish(lax.fori_loop(first, end, fold, carry)).reshape(q.shape[0], -1)
    return jnp.where(inside[:, None], out, jnp.nan)


def anywhere(one: Any, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """The same for all sequences with cuDNN's kernel. What a token does not attend to is told by a mask, all of which is read."""
    at, inside = jnp.arange(k.shape[2]), (positions >= 0) & (positions < k.shape[2])
    keep = at <= positions[..., None]
    if one.window is not None:
        keep &= at > positions[..., None] - one.window
    filled = jnp.maximum(jnp.where(inside, positions + 1, 1).max(1), 1)
    queries = jnp.full(positions.shape[0], positions.shape[1], jnp.int32)
    out: Any = dot_product_attention(
        jnp.moveaxis(q, 1, 2).astype(k.dtype), k, v, mask=keep[:, None], q_seqlen=queries, kv_seqlen=filled, scale=one.scale, mask_type=MaskType.PADDING,
        qkv_layout="BNTH",
    )  # fmt: skip
    return jnp.where(inside[..., None], jnp.moveaxis(out, 1, 2).astype(jnp.float32).reshape(*positions.shape, -1), jnp.nan)


def side_by_side(one: Any, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """The same with cuDNN's kernels, for positions that go up by one, pads last: elsewhere the results are NaN.

    cuDNN's causal mask has its corner at the first query and the first key. So what was there before is attended to without a mask, the tokens' own
    keys with one, and the two are merged by their logarithms of sums.
    """
    b, n, heads, head_dim = q.shape
    context = k.shape[2]
    start, inside = positions[:, 0], positions < context
    counts = inside.sum(1, dtype=jnp.int32)
    own = [jax.vmap(lambda a, at: a.at[:, at].get(mode="clip"))(a, positions) for a in (k, v)]
    cudnn: Any = functools.partial(dot_product_attention, scale=one.scale, qkv_layout="BNTH", return_residual=True)
    q = jnp.moveaxis(q, 1, 2).astype(k.dtype)
    new, new_sum = cudnn(q, *own, q_seqlen=counts, kv_seqlen=counts, mask_type=MaskType.PADDING_CAUSAL)
    old, old_sum = cudnn(q, k, v, q_seqlen=counts, kv_seqlen=jnp.maximum(start, 1), mask_type=MaskType.PADDING)
    weight = jnp.where(start[:, None, None] > 0, jax.nn.sigmoid(old_sum - new_sum), 0.0)[..., None]
    out = jnp.moveaxis(old * weight + new * (1 - weight), 1, 2).reshape(b, n, heads * head_dim)
    here = inside & (positions == start[:, None] + jnp.arange(n)) & (start >= 0)[:, None]
    return jnp.where(here[..., None], out, jnp.nan)
