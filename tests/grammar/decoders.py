"""Decoders: a `Spec` says what one is made of, `decoder` makes it. A refusal names a line of this package."""

import dataclasses
import functools
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


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Spec:
    """What a decoder is made of; expressions are those of `grammar.expressions`.

    stacks: layers of each `mk.layers`. unrolled: layers before them, each with leaves and a cache of its own. rope, append, attend: positions.
    before: of the embedding. into: of what q, k and v are projected from. query, keys: of heads [heads, head_dim]; values: of the flat
    projection. attended: of attention's result. out: of its projection. inner: of the MLP's. after: of the logits. scale: what a layer's halves
    are multiplied with. extra: results besides the logits and the cache. forbidden: something refused, and before which layer or at the end.
    """

    hidden: int = 128
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    width: int = 128  # of the MLP
    vocab: int = 64
    context: int = 128
    stacks: tuple[int, ...] = (2,)
    unrolled: int = 0
    norm: str = "rms"
    residual: str = "pre"
    mlp: str = "plain"
    bias: str = "none"
    head_norm: str = "none"
    rope: Expression = "pos"
    append: Expression = "pos"
    attend: Expression = "pos"
    window: int | None = None
    softcap: float | None = None
    attention_scale: float | None = None
    tied: bool = True
    before: Expression = "x"
    into: Expression = "x"
    query: Expression = "x"
    keys: Expression = "x"
    values: Expression = "x"
    attended: Expression = "x"
    out: Expression = "x"
    inner: Expression = "x"
    after: Expression = "x"
    scale: Expression = 1.0
    turned: str = "heads"
    again: str = "none"
    lean: int = 0
    fold: str = "none"
    fold_at: str = "head"
    extra: tuple[str, ...] = ()
    forbidden: tuple[str, str] | None = None

    def __repr__(self) -> str:
        """Without what is as it is by default."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return f"Spec({', '.join(f'{name}={value!r}' for name, value in fields.items())})"


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
    return jnp.maximum(carry, jnp.max(tile.astype(jnp.float32) + x, -1))


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

    def scope(self, p: Any) -> Scope:
        return Scope(self.params, p, self.token, self.pos)

    def at(self, e: Expression) -> Any:
        return integer(e, self.scope(None))

    def norm(self, x: jax.Array, p: Any, which: str) -> jax.Array:
        return NORMS[self.spec.norm](x, p[f"norm_{which}"], p[f"shift_{which}"])

    def project(self, p: Any, name: str, h: jax.Array) -> jax.Array:
        y = mk.linear(p[f"w{name}"], h)
        if self.spec.bias == "vector":
            return y + p[f"b{name}"]
        return y + p[f"b{name}"].reshape(-1) if self.spec.bias == "matrix" else y

    def heads(self, p: Any, h: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys, values as they are attended and appended."""
        spec, scope = self.spec, self.scope(p)
        q = mk.heads(self.project(p, "q", h), spec.heads)
        k = mk.heads(self.project(p, "k", h), spec.kv_heads)
        v = mk.heads(vector(spec.values, self.project(p, "v", h), scope), spec.kv_heads)
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
        return mk.rope(x, self.at(self.spec.rope))

    def attention(self, x: jax.Array, p: Any, kv: Any) -> tuple[jax.Array, Any]:
        spec, scope = self.spec, self.scope(p)
        q, k, v = self.heads(p, vector(spec.into, x, scope))
        kv = mk.append(kv, k, v, self.at(spec.append))
        a = self.attend(q, kv)
        if spec.again != "none":
            q = mk.heads(mk.linear(p["wq"], jnp.tanh(mk.linear(p["wo"], a))), spec.heads)
            kv = mk.append(kv, k, v, self.at(spec.append) + 1) if spec.again == "appended" else kv
            a = a + self.attend(q, kv)
        y = mk.linear(p["wo"], vector(spec.attended, a, scope))
        return vector(spec.out, y, scope) * number(spec.scale, scope), kv

    def attend(self, q: jax.Array, kv: Any) -> jax.Array:
        spec = self.spec
        return mk.attention(q, kv, self.at(spec.attend), scale=spec.attention_scale, window=spec.window, softcap=spec.softcap)

    def mlp(self, x: jax.Array, p: Any) -> jax.Array:
        spec, scope = self.spec, self.scope(p)
        if spec.mlp == "none":
            return jnp.zeros_like(x)
        up = (FOLDS[spec.fold] if spec.fold_at == "inner" else mk.linear)(p["wu"], x)
        up = vector(spec.inner, up, scope)
        inner = up * jax.nn.silu(mk.linear(p["wg"], x)) if spec.mlp == "gated" else up
        return mk.linear(p["wd"], inner) * number(spec.scale, scope)

    def layer(self, x: Any, p: Any, kv: Any) -> tuple[Any, Any]:
        return RESIDUALS[self.spec.residual](self, x, p, kv)


def _pre(f: Layers, x: Any, p: Any, kv: Any) -> Any:
    a, kv = f.attention(f.norm(x, p, "a"), p, kv)
    x = x + a
    return x + f.mlp(f.norm(x, p, "b"), p), kv


def _post(f: Layers, x: Any, p: Any, kv: Any) -> Any:
    a, kv = f.attention(x, p, kv)
    x = f.norm(x + a, p, "a")
    return f.norm(x + f.mlp(x, p), p, "b"), kv


def _parallel(f: Layers, x: Any, p: Any, kv: Any) -> Any:
    h = f.norm(x, p, "a")
    a, kv = f.attention(h, p, kv)
    return x + a + f.mlp(h, p), kv


def _two_norms(f: Layers, x: Any, p: Any, kv: Any) -> Any:
    a, kv = f.attention(f.norm(x, p, "a"), p, kv)
    return x + f.mlp(f.norm(x, p, "b"), p) + a, kv


def _sandwich(f: Layers, x: Any, p: Any, kv: Any) -> Any:
    a, kv = f.attention(f.norm(x, p, "a"), p, kv)
    x = x + f.norm(a, p, "b")
    return x + f.norm(f.mlp(f.norm(x, p, "a"), p), p, "b"), kv


def _bare(f: Layers, x: Any, p: Any, kv: Any) -> Any:
    a, kv = f.attention(f.norm(x, p, "a"), p, kv)
    return a + f.mlp(f.norm(a, p, "b"), p), kv


def _crossed(f: Layers, x: Any, p: Any, kv: Any) -> Any:
    a, kv = f.attention(f.norm(x, p, "a"), p, kv)
    m = f.mlp(f.norm(a, p, "b"), p)
    return 0.5 * (x + m) + a * jax.nn.sigmoid(m), kv


def _mlp_first(f: Layers, x: Any, p: Any, kv: Any) -> Any:
    x = x + f.mlp(f.norm(x, p, "b"), p)
    a, kv = f.attention(f.norm(x, p, "a"), p, kv)
    return x + a, kv


def _shared(f: Layers, x: Any, p: Any, kv: Any) -> Any:
    """The same MLP twice."""
    a, kv = f.attention(f.norm(x, p, "a"), p, kv)
    x = x + a + f.mlp(x, p)
    return x + f.mlp(f.norm(x, p, "b"), p), kv


def _delayed(f: Layers, xy: Any, p: Any, kv: Any) -> Any:
    """Two streams; the second is what the first was a layer ago."""
    x, y = xy
    new, kv = _pre(f, x + 0.5 * y, p, kv)
    return (new, x), kv


def _summed(f: Layers, xy: Any, p: Any, kv: Any) -> Any:
    """Two streams; the second sums up all layers' inputs."""
    x, y = xy
    new, kv = _pre(f, x, p, kv)
    return (new, 0.5 * (y + x)), kv


def _swapped(f: Layers, xy: Any, p: Any, kv: Any) -> Any:
    """Two streams that take turns, as in a reversible network."""
    x, y = xy
    a, kv = f.attention(f.norm(y, p, "a"), p, kv)
    return (y, x + a), kv


def _unused(f: Layers, xy: Any, p: Any, kv: Any) -> Any:
    """Two streams, one of which no layer changes."""
    x, y = xy
    new, kv = _pre(f, x * jax.nn.sigmoid(y), p, kv)
    return (new, y), kv


RESIDUALS: dict[str, Callable[..., Any]] = {
    "pre": _pre, "post": _post, "parallel": _parallel, "two norms": _two_norms, "sandwich": _sandwich, "bare": _bare, "crossed": _crossed,
    "mlp first": _mlp_first, "shared": _shared, "delayed": _delayed, "summed": _summed, "swapped": _swapped, "unused": _unused,
}  # fmt: skip
TWO_STREAMS = ("delayed", "summed", "swapped", "unused")


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


# Arguments.


@functools.cache
def _pool(exponent: int) -> np.ndarray:
    """Normal numbers times a power of two, in bfloat16."""
    drawn = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    return (drawn * 2.0**exponent).astype(ml_dtypes.bfloat16)


class Weights:
    """Draws arrays, all of them other ones."""

    def __init__(self) -> None:
        self.at = 0

    def normal(self, *shape: int, exponent: int | None = None) -> np.ndarray:
        """[.., out, in] over about sqrt(in); vectors around 0."""
        size, small = int(np.prod(shape)), -round(np.log2(shape[-1]) / 2) if len(shape) > 1 else -2
        self.at = (self.at + 7919) % ((1 << 20) - size)
        return _pool(small if exponent is None else exponent)[self.at : self.at + size].reshape(shape)

    def layer(self, spec: Spec, *lead: int) -> dict[str, Any]:
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        matrices = {"wq": (q, spec.hidden), "wk": (kv, spec.hidden), "wv": (kv, spec.hidden), "wo": (spec.hidden, q)}
        matrices |= {"wg": (spec.width, spec.hidden), "wu": (spec.width, spec.hidden), "wd": (spec.hidden, spec.width)}
        vectors = {f"{what}_{which}": spec.hidden for which in "ab" for what in ("norm", "shift")}
        vectors |= {"norm_query": spec.head_dim, "norm_key": spec.head_dim, "shift_head": spec.head_dim}
        found: dict[str, Any] = {name: self.normal(*lead, *shape) for name, shape in matrices.items()}
        found |= {name: self.normal(*lead, n, exponent=-2) for name, n in vectors.items()}
        heads = {"bq": spec.heads, "bk": spec.kv_heads, "bv": spec.kv_heads}
        flat = {n: (count * spec.head_dim,) if spec.bias == "vector" else (count, spec.head_dim) for n, count in heads.items()}
        found |= {name: self.normal(*lead, *shape, exponent=-2) for name, shape in flat.items()}
        found["vectors"] = {str(n): self.normal(*lead, n, exponent=-2) for n in {q, kv, spec.head_dim, spec.hidden, spec.width, spec.vocab}}
        found["vectors"]["heads"] = self.normal(*lead, spec.heads, exponent=-2)
        found["layer_scale"] = self.normal(*lead, exponent=-1).astype(np.float32) + np.float32(1)
        found["layer_gain"] = self.normal(*lead, exponent=-1)
        return found


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
