"""Small decoders that tests of graphs and kernels share: those of `mkdsl.models`, and some that only the DSL knows. Their weights come from numpy,
which compiles nothing."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mkdsl as mk
from mkdsl import models

LLAMA = models.DecoderConfig(
    hidden=128, layers=2, heads=4, kv_heads=1, head_dim=64, intermediate=192, vocab=320, eps=1e-5, theta=1e4, tied=False, max_context=128
)  # fmt: skip
SMOL = dataclasses.replace(LLAMA, hidden=192, heads=3, tied=True)
QWEN3 = dataclasses.replace(LLAMA, heads=4, kv_heads=2, head_dim=128, qk_norm=True, tied=True, theta=1e6, eps=1e-6)


def float32(tree: Any) -> Any:
    return jax.tree.map(lambda a: np.asarray(a, np.float32), tree)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decode step and its weights in bfloat16; `shape` is (layers, kv_heads, head_dim) of its cache, or (kv_heads, head_dim) without layers."""

    step: Callable[..., Any]
    params: Any
    shape: tuple[int, ...]

    def cache(self, context: int, *, batch: int | None = None, seed: int = 0) -> Any:
        """A cache full of numbers: what lies past `pos` must not matter."""
        shape = (*self.shape[:-1], context, self.shape[-1])
        rng = np.random.default_rng(seed + 100)
        return {name: _normal(rng, shape if batch is None else (batch, *shape)) for name in "kv"}

    def reference(self, kv: Any, token: Any, pos: Any) -> Any:
        """The decode step in float32, batched if the tokens are."""
        step = self.step if np.ndim(token) == 0 else jax.vmap(self.step, (None, 0, 0, 0))
        return jax.jit(step)(float32(self.params), float32(kv), token, pos)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], *, mean: float = 0.0, scale: float = 1.0) -> jax.Array:
    return jnp.asarray((mean + scale * rng.standard_normal(shape, np.float32)).astype(jnp.bfloat16))


def of(config: models.DecoderConfig, seed: int = 1) -> Decoder:
    """A model of `mkdsl.models`, its norms around 1."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        norm = "norm" in path[-1].key
        return _normal(rng, leaf.shape, mean=float(norm), scale=0.1 if norm else leaf.shape[-1] ** -0.5)

    params = jax.tree.map_with_path(draw, models.abstract_params(config))
    return Decoder(models.decode_step(config), params, (config.layers, config.kv_heads, config.head_dim))


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, jax.Array]:
    """Matrices [.., out, in] over sqrt(in); vectors around 0."""
    rng = np.random.default_rng(seed)
    scales = {name: 0.2 if "norm" in name or "bias" in name else shape[-1] ** -0.5 for name, shape in shapes.items()}
    return {name: _normal(rng, shape, scale=scales[name]) for name, shape in shapes.items()}


@mk.tile
def squared_relu(x: jax.Array) -> jax.Array:
    return jnp.square(jnp.maximum(x, 0))


def parallel_layer(x: jax.Array, p: Any, kv: Any, pos: jax.Array) -> tuple[jax.Array, Any]:
    """Attention and MLP side by side behind one layer norm, with biases."""
    h = mk.layer_norm(x, 1 + p["norm"].astype(jnp.float32), p["norm_bias"])
    q, k, v = (mk.heads(mk.linear(p[f"w{n}"], h, p[f"bias_{n}"]), count) for n, count in (("q", 4), ("k", 2), ("v", 2)))
    kv = mk.append(kv, mk.rope(k, pos), v, pos)
    inner = squared_relu(mk.linear(p["wi"], h, p["bias_i"]))
    return x + mk.linear(p["wo"], mk.attention(mk.rope(q, pos), kv, pos), p["bias_o"]) + mk.linear(p["wd"], inner), kv


def parallel_step(params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> Any:
    x, kv = mk.layers(parallel_layer, mk.embed(params["embed"], token), params["layers"], kv, pos)
    logits = mk.linear(params["head"], mk.layer_norm(x, eps=1e-6))
    return mk.argmax(logits), logits, kv


def parallel_params(layers: int, hidden: int) -> dict[str, jax.Array]:
    """Of so many parallel layers, stacked."""
    shapes = {"wq": (256, hidden), "wk": (128, hidden), "wv": (128, hidden), "wo": (hidden, 256), "wi": (448, hidden), "wd": (hidden, 448)}
    shapes |= {"norm": (hidden,), "norm_bias": (hidden,), "bias_q": (256,), "bias_k": (128,), "bias_v": (128,), "bias_o": (hidden,)}
    return drawn({name: (layers, *shape) for name, shape in (shapes | {"bias_i": (448,)}).items()}, 3)


@functools.cache
def parallel(layers: int = 2) -> Decoder:
    params: dict[str, Any] = drawn({"embed": (192, 128), "head": (192, 128)}, 2)
    return Decoder(parallel_step, params | {"layers": parallel_params(layers, 128)}, (layers, 2, 64))


@mk.tile
def gelu_gate(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.gelu(gate, approximate=True) * up


def plus_one(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Gemma's norm, whose weights are around 0."""
    return mk.rms_norm(x, 1 + weight.astype(jnp.float32))


def gemma_layer(x: jax.Array, p: Any, kv: Any, pos: jax.Array) -> tuple[jax.Array, Any]:
    """Norms before and after both halves, soft-capped scores, a sliding window."""
    h = plus_one(x, p["norm_a"])
    q, k, v = (mk.heads(mk.linear(p[f"w{n}"], h), count) for n, count in (("q", 2), ("k", 2), ("v", 2)))
    kv = mk.append(kv, mk.rope(k, pos), v, pos)
    a = mk.attention(mk.rope(q, pos), kv, pos, scale=0.1, window=50, softcap=5.0)
    x = x + plus_one(mk.linear(p["wo"], a), p["norm_b"])
    h = plus_one(x, p["norm_c"])
    return x + plus_one(mk.linear(p["wd"], gelu_gate(mk.linear(p["wg"], h), mk.linear(p["wu"], h))), p["norm_d"]), kv


def gemma_step(params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> Any:
    x = mk.embed(params["embed"], token) * jnp.float32(192**0.5)
    x, kv = mk.layers(gemma_layer, x, params["layers"], kv, pos)
    logits = 30 * jnp.tanh(mk.linear(params["embed"], plus_one(x, params["norm"])) / 30)
    return mk.argmax(logits), logits, kv


@functools.cache
def gemma(layers: int = 2) -> Decoder:
    shapes = {"wq": (128, 192), "wk": (128, 192), "wv": (128, 192), "wo": (192, 128), "wg": (320, 192), "wu": (320, 192), "wd": (192, 320)}
    shapes |= {f"norm_{n}": (192,) for n in "abcd"}
    params: dict[str, Any] = drawn({"embed": (192, 192), "norm": (192,)}, 4)
    return Decoder(gemma_step, params | {"layers": drawn({n: (layers, *s) for n, s in shapes.items()}, 5)}, (layers, 2, 64))


def attend_step(params: Any, kv: Any, token: jax.Array, pos: jax.Array, *, heads: int) -> Any:
    """One attention between two folds: as few phases as have one of each kind that streams."""
    x = mk.embed(params["embed"], token)
    q, k, v = (mk.heads(mk.linear(params[name], x), count) for name, count in (("wq", heads), ("wk", 1), ("wv", 1)))
    kv = mk.append(kv, mk.rope(k, pos), v, pos)
    logits = x + mk.linear(params["wo"], mk.attention(mk.rope(q, pos), kv, pos))
    return mk.argmax(logits), logits, kv


@functools.cache
def attend(heads: int = 3, head_dim: int = 64) -> Decoder:
    shapes = {
        "embed": (192, 192),
        "wq": (heads * head_dim, 192),
        "wk": (head_dim, 192),
        "wv": (head_dim, 192),
        "wo": (192, heads * head_dim),
    }
    return Decoder(functools.partial(attend_step, heads=heads), drawn(shapes, 6), (1, head_dim))
