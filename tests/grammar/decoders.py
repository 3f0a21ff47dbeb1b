"""Decoders: `decoder` makes what a `Spec` says. A refusal names a line of this package."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

import mkdsl as mk
from grammar.expressions import NORMS, Expression, Scope, integer, number, vector
from grammar.refused import REFUSED
from grammar.residuals import RESIDUALS, TWO_STREAMS
from grammar.spec import Spec
from grammar.weights import Weights


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decode step, and arguments for it in numpy, without token and position."""

    step: Callable[..., Any]
    params: Any
    kv: Any


# What is not built into the language.


def _distance(carry: Any, tile: jax.Array, x: jax.Array) -> Any:
    return carry + 0.1 * jnp.sum(jnp.abs(tile.astype(jnp.float32) - x), -1)


def _greatest(carry: Any, tile: jax.Array, x: jax.Array) -> Any:
    return jnp.maximum(carry, jnp.max(16 * tile.astype(jnp.float32) + x, -1))


def _cosine(carry: Any, tile: jax.Array, x: jax.Array) -> Any:
    return carry[0] + mk.dot(tile, x), carry[1] + jnp.sum(tile.astype(jnp.float32) ** 2, -1)


def _range(carry: Any, tile: jax.Array, x: jax.Array) -> Any:
    product = tile.astype(jnp.float32) * x
    return jnp.maximum(carry[0], jnp.max(product, -1)), jnp.minimum(carry[1], jnp.min(product, -1))


FOLDS: dict[str, Callable[..., jax.Array]] = {
    "none": lambda w, x: mk.linear(w, x),
    "distance": lambda w, x: mk.fold(_distance, w, x, name="distance"),
    "max plus": lambda w, x: mk.fold(_greatest, w, x, init=-jnp.inf, merge=jnp.maximum, name="max_plus"),
    "cosine": lambda w, x: mk.fold(_cosine, w, x, init=(0.0, 0.0), finish=lambda c: c[0] * lax.rsqrt(c[1] + 0.01), name="cosine"),
    "range": lambda w, x: mk.fold(
        _range, w, x, init=(-jnp.inf, jnp.inf), merge=lambda a, b: (jnp.maximum(a[0], b[0]), jnp.minimum(a[1], b[1])),
        finish=lambda c: c[0] - 0.5 * c[1], name="range",
    ),
}  # fmt: skip


class Layers:
    """The layers of a spec, for one token."""

    def __init__(self, spec: Spec, params: Any, token: jax.Array, pos: jax.Array) -> None:
        self.spec, self.params, self.token, self.pos = spec, params, token, pos
        self.first = jnp.zeros(())  # the embedding

    def scope(self, p: Any) -> Scope:
        return Scope(self.params, p, self.token, self.pos)

    def at(self, e: Expression) -> Any:
        return integer(e, self.scope(None))

    def norm(self, x: jax.Array, p: Any, which: str) -> jax.Array:
        return NORMS[self.spec.norm](x, p[f"norm_{which}"], p[f"shift_{which}"])

    def projected(self, p: Any, names: str, h: jax.Array) -> list[jax.Array]:
        """Projections by weights of their own, or by rows of one."""
        sizes = [p[f"w{n}"].shape[0] for n in names]
        ends = list(itertools.accumulate(sizes))
        ranges = [slice(end - n, end) for end, n in zip(ends, sizes, strict=True)]
        if self.spec.fused == "none":
            return [mk.linear(p[f"w{n}"], h) for n in names]
        if self.spec.fused == "weight":
            return [mk.linear(p[f"w{names}"][rows], h) for rows in ranges]
        y = mk.linear(p[f"w{names}"], h)
        if self.spec.fused == "sliced":
            return [y[rows] for rows in ranges]
        head = math.gcd(*sizes) if self.spec.fused == "heads" else 1
        parts = jnp.split(y.reshape(-1, head) if head > 1 else y, [end // head for end in ends[:-1]])
        return [a.reshape(-1) for a in parts]

    def biased(self, p: Any, name: str, y: jax.Array) -> jax.Array:
        if self.spec.bias == "vector":
            return y + p[f"b{name}"]
        return y + p[f"b{name}"].reshape(-1) if self.spec.bias == "matrix" else y

    def heads(self, p: Any, h: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys, values as they are attended and appended."""
        spec, scope = self.spec, self.scope(p)
        q, k, v = (self.biased(p, n, y) for n, y in zip("qkv", self.projected(p, "qkv", h), strict=True))
        q, k = mk.heads(q, spec.heads), mk.heads(k, spec.kv_heads)
        v = mk.heads(vector(spec.values, v, scope), spec.kv_heads)
        q, k = (NORMS[spec.head_norm](a, p[f"norm_{n}"], p["shift_head"]) for a, n in ((q, "query"), (k, "key")))
        if spec.bias == "heads":
            q = q + p["bq"]
        if spec.bias == "numbers":
            q = q * (1 + p["vectors"]["heads"][:, None])
        q, k = vector(spec.query, q, scope), vector(spec.keys, k, scope)
        return (q, k, v) if spec.rope is None else (self.turn(q), self.turn(k), v)

    def turn(self, x: jax.Array) -> jax.Array:
        if self.spec.turned == "halves":
            return mk.rope(x.reshape(-1, self.spec.head_dim // 2), self.at(self.spec.rope)).reshape(x.shape)
        dims = self.spec.head_dim // 4 if "part" in self.spec.turned else None
        return mk.rope(x, self.at(self.spec.rope), dims=dims, interleaved="pairs" in self.spec.turned)

    def attention(self, x: jax.Array, p: Any, kv: Any) -> tuple[jax.Array, Any]:
        spec, scope = self.spec, self.scope(p)
        x = vector(spec.into, x, scope)
        q, k, v = self.heads(p, x)
        kv = mk.append(kv, k, v, self.at(spec.append))
        a = self.attend(q, kv)
        if spec.again != "none":
            q = mk.heads(mk.linear(p["wq"], jnp.tanh(mk.linear(p["wo"], a))), spec.heads)
            kv = mk.append(kv, k, v, self.at(spec.append) + 1) if spec.again == "appended" else kv
            a = a + self.attend(q, kv)
        if spec.gated:
            a = a * jax.nn.sigmoid(mk.linear(p["wq"], x))
        y = mk.linear(p["wo"], vector(spec.attended, a, scope))
        return vector(spec.out, y, scope) * number(spec.scale, scope), kv

    def attend(self, q: jax.Array, kv: Any) -> jax.Array:
        spec = self.spec
        return mk.attention(q, kv, self.at(spec.attend), scale=spec.attention_scale, window=spec.window, softcap=spec.softcap)

    def mlp(self, x: jax.Array, p: Any) -> jax.Array:
        spec, scope = self.spec, self.scope(p)
        if spec.mlp == "none":
            return jnp.zeros_like(x)
        if spec.mlp == "gated" and spec.fused != "none":
            gate, up = self.projected(p, "gu", x)
            inner = vector(spec.inner, up, scope) * jax.nn.silu(gate)
            return mk.linear(p["wd"], inner) * number(spec.scale, scope)
        up = (FOLDS[spec.fold] if spec.fold_at == "inner" else mk.linear)(p["wu"], x)
        up = vector(spec.inner, up, scope)
        inner = up * jax.nn.silu(mk.linear(p["wg"], x)) if spec.mlp == "gated" else up
        return mk.linear(p["wd"], inner) * number(spec.scale, scope)

    def layer(self, x: Any, p: Any, kv: Any) -> tuple[Any, Any]:
        return RESIDUALS[self.spec.residual](self, x, p, kv)


def _stack(f: Layers, x: jax.Array, p: Any, kv: Any) -> tuple[jax.Array, Any]:
    """A stack of layers over its streams, which are one before and after."""
    if f.spec.residual not in TWO_STREAMS:
        return mk.layers(f.layer, x, p, kv)
    (x, y), kv = mk.layers(f.layer, (x, jnp.tanh(x)), p, kv)
    return x + 0.5 * y, kv


def _step(spec: Spec, params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> Any:
    f = Layers(spec, params, token, pos)
    scope = f.scope(params["top"])
    x = vector(spec.before, mk.embed(params["embed"], token), scope).astype(jnp.float32)
    if spec.forbidden and spec.forbidden[1] == "first":
        x = REFUSED[spec.forbidden[0]](x, params, token, pos)
    f.first = jnp.tanh(x)
    done: dict[str, list[Any]] = {"unrolled": [], "stacks": []}
    for p, cache in zip(params["unrolled"], kv["unrolled"], strict=True):
        y = (x, jnp.tanh(x)) if spec.residual in TWO_STREAMS else x
        y, cache = f.layer(y, p, cache)
        x = y[0] + 0.5 * y[1] if spec.residual in TWO_STREAMS else y
        done["unrolled"].append(cache)
    for p, cache in zip(params["stacks"], kv["stacks"], strict=True):
        x, cache = _stack(f, x, p, cache)
        done["stacks"].append(cache)
    if spec.lean:
        x, _ = mk.layers(lambda x, p, kv: (x + f.mlp(f.norm(x, p, "b"), p), kv), x, params["lean"], ())
    if spec.forbidden and spec.forbidden[1] == "last":
        x = REFUSED[spec.forbidden[0]](x, params, token, pos)
    h = f.norm(x, params["top"], "a")
    y = (FOLDS[spec.fold] if spec.fold_at == "head" else mk.linear)(params["embed" if spec.tied else "head"], h)
    logits = vector(spec.after, y, scope)
    return logits, *(EXTRAS[name](f, x, h, logits) for name in spec.extra), done


EXTRAS: dict[str, Callable[..., Any]] = {
    "token": lambda f, x, h, logits: mk.argmax(logits),
    "hidden": lambda f, x, h, logits: x,
    "normed": lambda f, x, h, logits: h,
    "probabilities": lambda f, x, h, logits: jax.nn.softmax(logits),
    "log probabilities": lambda f, x, h, logits: jax.nn.log_softmax(logits),
    "next position": lambda f, x, h, logits: f.pos + 1,
    "the token itself": lambda f, x, h, logits: f.token,
    "loudest feature": lambda f, x, h, logits: mk.argmax(jnp.abs(x)),
    "least likely": lambda f, x, h, logits: mk.argmax(-logits),
    "both": lambda f, x, h, logits: mk.argmax(logits) + f.pos,
    "scaled": lambda f, x, h, logits: logits / f.params["temperature"],
    "square": lambda f, x, h, logits: logits * logits,
    "projected": lambda f, x, h, logits: mk.linear(f.params["also"], x),
    "temperature": lambda f, x, h, logits: f.params["temperature"] * 2,
    "embedding": lambda f, x, h, logits: mk.embed(f.params["embed"], f.token),
    "signs": lambda f, x, h, logits: jnp.sign(logits).astype(jnp.int32),
    "narrow": lambda f, x, h, logits: logits.astype(jnp.bfloat16),
    "sum": lambda f, x, h, logits: logits.sum(),
    "one": lambda f, x, h, logits: jnp.float32(1.0),
}


def decoder(spec: Spec) -> Decoder:
    """The decoder that a spec says, with weights that are always the same."""
    w = Weights()
    embed = w.normal(spec.vocab, spec.hidden, exponent=-2)
    params: dict[str, Any] = {
        "embed": embed, "also": w.normal(64, spec.hidden), "temperature": np.float32(1.7), "shift": np.int32(5), "gain": np.asarray(0.75, ml_dtypes.bfloat16),
        "top": w.layer(spec), "lean": w.layer(spec, max(1, spec.lean)),
        "unrolled": [w.layer(spec) for _ in range(spec.unrolled)], "stacks": [w.layer(spec, n) for n in spec.stacks],
    }  # fmt: skip
    params["head"] = w.normal(spec.vocab, spec.hidden)
    widths = {spec.hidden, spec.width, spec.vocab, spec.head_dim, spec.kv_heads * spec.head_dim, spec.heads * spec.head_dim}
    params["rows"] = {str(n): w.normal(17, n, exponent=-1) for n in widths}
    shape = spec.kv_heads, spec.context, spec.head_dim
    kv = {
        "unrolled": [(w.normal(*shape, exponent=0), w.normal(*shape, exponent=0)) for _ in range(spec.unrolled)],
        "stacks": [(w.normal(n, *shape, exponent=0), w.normal(n, *shape, exponent=0)) for n in spec.stacks],
    }
    return Decoder(functools.partial(_step, spec), params, kv)
