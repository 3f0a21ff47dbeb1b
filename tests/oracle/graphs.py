"""Graphs for tests: decoders from their shapes alone, and some built phase by phase, by hand or at random."""

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import networkx as nx
from hypothesis import strategies as st

import mkdsl.ops as mk
from mkdsl.graph import AttentionPhase, FoldPhase, MapPhase, OpGraph, Part, Phase, Segment, Tensor, build_graph

Layer = Callable[..., Any]
Random = random.Random


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a decoder; by default a small one."""

    hidden: int = 128
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    inner: int = 256
    vocab: int = 192
    context: int = 128


SMALL = Shape()


def llama(*, window: int | None = None, **shape: int) -> OpGraph:
    """A Llama-shaped decoder. shape: fields of `Shape`."""
    return _llama(Shape(**shape), window)


@functools.cache
def _llama(shape: Shape, window: int | None) -> OpGraph:
    def layer(x, p, kv, pos):
        h = mk.rms_norm(x, p["n1"], eps=1e-5)
        q = mk.rope(mk.heads(mk.linear(p["wq"], h), shape.heads), pos, theta=1e4)
        k = mk.rope(mk.heads(mk.linear(p["wk"], h), shape.kv_heads), pos, theta=1e4)
        v = mk.heads(mk.linear(p["wv"], h), shape.kv_heads)
        kv = mk.append(kv, k, v, pos)
        x = x + mk.linear(p["wo"], mk.attention(q, kv, pos, window=window))
        h = mk.rms_norm(x, p["n2"], eps=1e-5)
        gate, up = mk.linear(p["wg"], h), mk.linear(p["wu"], h)
        return x + mk.linear(p["wd"], gate * jax.nn.sigmoid(gate) * up), kv

    return _trace(layer, shape)


@functools.cache
def parallel() -> OpGraph:
    """Attention and MLP side by side, layer norms: the residual stream is read by the phase that writes it."""

    def layer(x, p, kv, pos):
        h = mk.rms_norm(x, p["n1"])
        q, k, v = (mk.heads(mk.linear(p[w], h), n) for w, n in (("wq", 4), ("wk", 2), ("wv", 2)))
        kv = mk.append(kv, k, v, pos)
        u = jnp.square(jax.nn.relu(mk.linear(p["wu"], h)))
        return x + mk.linear(p["wo"], mk.attention(q, kv, pos)) + mk.linear(p["wd"], u), kv

    return _trace(layer, SMALL)


@functools.cache
def sandwich() -> OpGraph:
    """Norms after each block, as in Gemma: a layer ends in a map."""

    def layer(x, p, kv, pos):
        h = mk.rms_norm(x, p["n1"])
        q, k, v = (mk.heads(mk.linear(p[w], h), n) for w, n in (("wq", 4), ("wk", 2), ("wv", 2)))
        kv = mk.append(kv, k, v, pos)
        x = x + mk.rms_norm(mk.linear(p["wo"], mk.attention(q, kv, pos)), p["n2"])
        h = mk.rms_norm(x, p["n1"])
        u = jax.nn.gelu(mk.linear(p["wg"], h)) * mk.linear(p["wu"], h)
        return x + mk.rms_norm(mk.linear(p["wd"], u), p["n2"]), kv

    return _trace(layer, SMALL)


@functools.cache
def attention_only() -> OpGraph:
    """An attention has no epilogue, so a map adds its result to the residual stream."""

    def layer(x, p, kv, pos):
        h = mk.rms_norm(x, p["n1"])
        q, k, v = (mk.heads(mk.linear(p[w], h), n) for w, n in (("wq", 2), ("wk", 1), ("wv", 1)))
        kv = mk.append(kv, k, v, pos)
        return x + mk.attention(q, kv, pos), kv

    return _trace(layer, dataclasses.replace(SMALL, heads=2, kv_heads=1, inner=64))


def _trace(layer: Layer, shape: Shape) -> OpGraph:
    def step(params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> Any:
        x = mk.embed(params["embed"], token)
        x, kv = mk.layers(layer, x, params["layers"], kv, pos)
        logits = mk.linear(params["embed"], mk.rms_norm(x, params["norm"], eps=1e-5))
        return mk.argmax(logits), logits, kv

    def leaf(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16)

    s = shape
    q, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim
    shapes = {"wq": (q, s.hidden), "wk": (kv_width, s.hidden), "wv": (kv_width, s.hidden), "wo": (s.hidden, q)}
    shapes |= {"wg": (s.inner, s.hidden), "wu": (s.inner, s.hidden), "wd": (s.hidden, s.inner), "n1": (s.hidden,), "n2": (s.hidden,)}
    layers = {name: leaf(s.layers, *dims) for name, dims in shapes.items()}
    params = {"embed": leaf(s.vocab, s.hidden), "norm": leaf(s.hidden), "layers": layers}
    kv = (leaf(s.layers, s.kv_heads, s.context, s.head_dim),) * 2
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    return build_graph(step, params, kv, scalar, scalar)[0]


def llama_1b(context: int = 512) -> OpGraph:
    return llama(hidden=2048, layers=16, heads=32, kv_heads=8, head_dim=64, inner=8192, vocab=128256, context=context)


def llama_8b(context: int = 4096) -> OpGraph:
    return llama(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, inner=14336, vocab=128256, context=context)


def tiny(layers: int = 5) -> OpGraph:
    return llama(layers=layers)


# Phases alone: all that search, proof and simulator read of a graph.


def make_graph(segments: list[tuple[int, list[Phase]]], tensors: list[Tensor], context: int = 128) -> OpGraph:
    """A graph of (repeats, phases) segments."""
    phases = tuple(p for _, ps in segments for p in ps)
    looped = tuple(Segment(phases=tuple(p.name for p in ps), repeats=n) for n, ps in segments)
    return OpGraph(nx.DiGraph(), phases, looped, {t.name: t for t in tensors}, {}, {}, {}, (), context)


def map_of(name: str, tensor: Tensor, *, segment: int = 0, reads: tuple[str, ...] = (), row_reads: tuple[str, ...] = ()) -> MapPhase:
    """A map that writes one tensor."""
    part = Part(weights=(), rows=tensor.width, writes=(tensor.name,))
    return MapPhase(name=name, segment=segment, parts=(part,), reads=reads, row_reads=row_reads)


@functools.cache
def long_chain(phases: int, rows: int = 1056, repeats: int = 1) -> OpGraph:
    """A model without two phases alike: each fold reads the one before whole, and the one before that by rows. The last writes the state."""
    tensors = [Tensor(name=f"t{i}", width=rows) for i in range(phases - 1)] + [Tensor(name="x", width=rows, carried=True)]
    names = [t.name for t in tensors]
    first = FoldPhase(name="first", segment=0, parts=(Part(weights=("w",), rows=rows, writes=("x",)),), reads=(), row_reads=(), k=1024)
    body: list[Phase] = [
        FoldPhase(
            name=f"p{i}", segment=1, parts=(Part(weights=(f"w{i}",), rows=rows, writes=(name,)),), k=1024,
            reads=(names[i - 1],), row_reads=tuple(names[i - 2 : i - 1]) if i > 1 else (),
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    return make_graph([(1, [first]), (repeats, body)], tensors)


def free_running() -> OpGraph:
    """A loop in which a phase reads nothing, so that only the order of its own iterations holds it back."""
    x, t, out = Tensor(name="x", width=64, carried=True), Tensor(name="t", width=128), Tensor(name="out", width=128, output=True)
    loop: list[Phase] = [map_of("free", t, segment=1), map_of("state", x, segment=1, reads=("x", "t"))]
    return make_graph([(1, [map_of("first", x)]), (3, loop), (1, [map_of("end", out, segment=2, reads=("x",))])], [x, t, out])


# Random ones, from one random number generator: the same everywhere for the same seed.


def graphs(*, max_phases: int = 4, scale: int = 1) -> st.SearchStrategy[OpGraph]:
    """The same graphs, drawn and shrunk by hypothesis."""
    return st.randoms(use_true_random=False).map(lambda r: random_graph(r, max_phases=max_phases, scale=scale))


def random_graph(r: Random, *, max_phases: int = 4, scale: int = 1) -> OpGraph:
    """A first phase that writes the loop state, a loop of random phases of which one writes it again, and an end that reads it.

    Args:
      r: what decides everything.
      max_phases: of the loop.
      scale: all widths are multiples of 64 x scale.
    """
    x, out = Tensor(name="x", width=64 * scale * r.randint(1, 3), carried=True), Tensor(name="out", width=128, output=True)
    tensors, loop = _before_state(r, x, r.randint(0, max_phases - 1), scale)
    state, made = _phase(r, len(loop), tensors, x, scale)
    if not any("x" in p.reads for p in loop):  # someone reads the whole state, or nothing orders its first instance before the next ones
        state = dataclasses.replace(state, reads=("x", *(t for t in state.reads if t != "x")))
    anywhere = not {*state.reads, *state.row_reads} - {"x"}
    loop.insert(r.randint(0, len(loop)) if anywhere and r.random() < 0.5 else len(loop), state)
    part = Part(weights=("h",), rows=out.width, writes=("out",))
    head = FoldPhase(name="head", segment=2, parts=(part,), reads=("x",), row_reads=(), k=x.width)
    segments: list[tuple[int, list[Phase]]] = [(1, [map_of("first", x)]), (r.choice((1, 2, 3, 7)), loop), (1, [head])]
    return make_graph(segments, [*tensors, *made[1:], out])


def _before_state(r: Random, x: Tensor, n: int, scale: int) -> tuple[list[Tensor], list[Phase]]:
    """n phases of the loop, each of which may read what those before it write; returned with all tensors."""
    tensors, loop = [x], []
    for i in range(n):
        if r.random() < 1 / 3:
            phase, made = _attention(r, i, tensors)
        else:
            phase, made = _phase(r, i, tensors, Tensor(name=f"t{i}", width=64 * scale * r.randint(1, 3)), scale)
        loop.append(phase)
        tensors += made
    return tensors, loop


def _phase(r: Random, index: int, known: list[Tensor], out: Tensor, scale: int) -> tuple[Phase, list[Tensor]]:
    """A fold or map that writes `out`, and perhaps more; returned with all it writes."""
    made = [out]
    if r.random() < 0.5:
        made.append(Tensor(name=f"{out.name}.b", width=64 * scale * r.randint(1, 3)))
    common: dict[str, Any] = {
        "name": f"p{index}",
        "segment": 1,
        "reads": _some(r, known),
        "row_reads": _some(r, [t for t in known if t.width == out.width]),
    }
    if r.random() < 0.25:
        return MapPhase(parts=tuple(Part(weights=(), rows=t.width, writes=(t.name,)) for t in made), **common), made
    weights = [(f"w{index}",) * r.randint(1, 2), (f"v{index}",)]
    parts = tuple(Part(weights=w, rows=t.width, writes=(t.name,)) for w, t in zip(weights, made, strict=False))
    k, parallel, separable = 64 * scale * r.randint(1, 6), r.random() < 0.5, r.random() < 0.75
    return FoldPhase(parts=parts, k=k, parallel=parallel, separable=separable, **common), made


def _some(r: Random, tensors: list[Tensor]) -> tuple[str, ...]:
    """Up to two of them."""
    return tuple(t.name for t in r.sample(tensors, min(len(tensors), r.randint(0, 2))))


def _attention(r: Random, index: int, known: list[Tensor]) -> tuple[Phase, list[Tensor]]:
    heads, kv_heads = r.choice(((2, 2), (4, 2), (3, 1)))
    out = Tensor(name=f"t{index}", width=heads * 64, heads=heads)
    part = Part(weights=(), rows=out.width, writes=(out.name,))
    phase = AttentionPhase(
        name=f"p{index}", segment=1, parts=(part,), reads=tuple(t.name for t in known[-2:]), row_reads=(), context=64 * r.randint(1, 3),
        heads=heads, kv_heads=kv_heads, head_dim=64,
    )  # fmt: skip
    return phase, [out]
