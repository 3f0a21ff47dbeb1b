"""How a layer joins its halves, attention and MLP: each from `f`, a `decoders.Layers`, and its streams, weights and cache."""

from collections.abc import Callable
from typing import Any

import jax


def _pre(f: Any, x: Any, p: Any, kv: Any) -> Any:
    a, kv = f.attention(f.norm(x, p, "a"), p, kv)
    x = x + a
    return x + f.mlp(f.norm(x, p, "b"), p), kv


def _post(f: Any, x: Any, p: Any, kv: Any) -> Any:
    a, kv = f.attention(x, p, kv)
    x = f.norm(x + a, p, "a")
    return f.norm(x + f.mlp(x, p), p, "b"), kv


def _parallel(f: Any, x: Any, p: Any, kv: Any) -> Any:
    h = f.norm(x, p, "a")
    a, kv = f.attention(h, p, kv)
    return x + a + f.mlp(h, p), kv


def _two_norms(f: Any, x: Any, p: Any, kv: Any) -> Any:
    a, kv = f.attention(f.norm(x, p, "a"), p, kv)
    return x + f.mlp(f.norm(x, p, "b"), p) + a, kv


def _sandwich(f: Any, x: Any, p: Any, kv: Any) -> Any:
    a, kv = f.attention(f.norm(x, p, "a"), p, kv)
    x = x + f.norm(a, p, "b")
    return x + f.norm(f.mlp(f.norm(x, p, "a"), p), p, "b"), kv


def _bare(f: Any, x: Any, p: Any, kv: Any) -> Any:
    a, kv = f.attention(f.norm(x, p, "a"), p, kv)
    return a + f.mlp(f.norm(a, p, "b"), p), kv


def _crossed(f: Any, x: Any, p: Any, kv: Any) -> Any:
    a, kv = f.attention(f.norm(x, p, "a"), p, kv)
    m = f.mlp(f.norm(a, p, "b"), p)
    return 0.5 * (x + m) + a * jax.nn.sigmoid(m), kv


def _mlp_first(f: Any, x: Any, p: Any, kv: Any) -> Any:
    x = x + f.mlp(f.norm(x, p, "b"), p)
    a, kv = f.attention(f.norm(x, p, "a"), p, kv)
    return x + a, kv


def _shared(f: Any, x: Any, p: Any, kv: Any) -> Any:
    """The same MLP twice."""
    a, kv = f.attention(f.norm(x, p, "a"), p, kv)
    x = x + a + f.mlp(x, p)
    return x + f.mlp(f.norm(x, p, "b"), p), kv


def _delayed(f: Any, xy: Any, p: Any, kv: Any) -> Any:
    """Two streams; the second is what the first was a layer ago."""
    x, y = xy
    new, kv = _pre(f, x + 0.5 * y, p, kv)
    return (new, x), kv


def _summed(f: Any, xy: Any, p: Any, kv: Any) -> Any:
    """Two streams; the second sums up all layers' inputs."""
    x, y = xy
    new, kv = _pre(f, x, p, kv)
    return (new, 0.5 * (y + x)), kv


def _swapped(f: Any, xy: Any, p: Any, kv: Any) -> Any:
    """Two streams that take turns, as in a reversible network."""
    x, y = xy
    a, kv = f.attention(f.norm(y, p, "a"), p, kv)
    return (y, x + a), kv


def _unused(f: Any, xy: Any, p: Any, kv: Any) -> Any:
    """Two streams, one of which no layer changes."""
    x, y = xy
    new, kv = _pre(f, x * jax.nn.sigmoid(y), p, kv)
    return (new, y), kv


def _skipped(f: Any, x: Any, p: Any, kv: Any) -> Any:
    """Each layer sees the embedding again."""
    a, kv = f.attention(f.norm(x, p, "a") + f.first, p, kv)
    return x + a * jax.nn.sigmoid(f.first) + f.mlp(f.norm(x, p, "b"), p), kv


def _same(f: Any, xy: Any, p: Any, kv: Any) -> Any:
    """Two streams that become one."""
    x, y = xy
    new, kv = _pre(f, x - 0.5 * y, p, kv)
    return (new, new), kv


RESIDUALS: dict[str, Callable[..., Any]] = {
    "pre": _pre, "post": _post, "parallel": _parallel, "two norms": _two_norms, "sandwich": _sandwich, "bare": _bare, "crossed": _crossed,
    "mlp first": _mlp_first, "shared": _shared, "delayed": _delayed, "summed": _summed, "swapped": _swapped, "unused": _unused, "skipped": _skipped, "same": _same,
}  # fmt: skip
TWO_STREAMS = ("delayed", "summed", "swapped", "unused", "same")
