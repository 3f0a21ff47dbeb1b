"""Graphs for the search's tests: real decoders from their shapes, and small random ones built phase by phase."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import networkx as nx
from hypothesis import strategies as st

import mkdsl.ops as mk
from mkdsl.graph import OpGraph, Part, Phase, Segment, Tensor, build_graph


@functools.cache
def llama(
    *, hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, inner: int, vocab: int, context: int, window: int | None = None
) -> OpGraph:
    """A Llama-shaped decoder."""

    def layer(x, p, kv, pos):
        h = mk.rms_norm(x, p["n1"], eps=1e-5)
        q = mk.rope(mk.heads(mk.linear(p["wq"], h), heads), pos, theta=1e4)
        k = mk.rope(mk.heads(mk.linear(p["wk"], h), kv_heads), pos, theta=1e4)
        v = mk.heads(mk.linear(p["wv"], h), kv_heads)
        kv = mk.append(kv, k, v, pos)
        x = x + mk.linear(p["wo"], mk.attention(q, kv, pos, window=window))
        h = mk.rms_norm(x, p["n2"], eps=1e-5)
        gate, up = mk.linear(p["wg"], h), mk.linear(p["wu"], h)
        return x + mk.linear(p["wd"], gate * jax.nn.sigmoid(gate) * up), kv

    return _trace(layer, hidden, layers, heads, kv_heads, head_dim, inner, vocab, context)


@functools.cache
def parallel() -> OpGraph:
    """Attention and MLP side by side, layer norms: the residual stream is read by the phase that writes it."""

    def layer(x, p, kv, pos):
        h = mk.rms_norm(x, p["n1"])
        q, k, v = (mk.heads(mk.linear(p[w], h), n) for w, n in (("wq", 4), ("wk", 2), ("wv", 2)))
        kv = mk.append(kv, k, v, pos)
        u = jnp.square(jax.nn.relu(mk.linear(p["wu"], h)))
        return x + mk.linear(p["wo"], mk.attention(q, kv, pos)) + mk.linear(p["wd"], u), kv

    return _trace(layer, 128, 5, 4, 2, 64, 256, 192, 128)


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

    return _trace(layer, 128, 5, 4, 2, 64, 256, 192, 128)


@functools.cache
def attention_only() -> OpGraph:
    """Attention has no finish, so a map adds its result to the residual stream."""

    def layer(x, p, kv, pos):
        h = mk.rms_norm(x, p["n1"])
        q, k, v = (mk.heads(mk.linear(p[w], h), n) for w, n in (("wq", 2), ("wk", 1), ("wv", 1)))
        kv = mk.append(kv, k, v, pos)
        return x + mk.attention(q, kv, pos), kv

    return _trace(layer, 128, 5, 2, 1, 64, 64, 192, 128)


def _trace(layer, hidden, layers, heads, kv_heads, head_dim, inner, vocab, context) -> OpGraph:
    def step(params, kv, token, pos):
        x = mk.embed(params["embed"], token)
        x, kv = mk.layers(layer, x, params["layers"], kv, pos)
        logits = mk.linear(params["embed"], mk.rms_norm(x, params["norm"], eps=1e-5))
        return mk.argmax(logits), logits, kv

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    q, kv_width = heads * head_dim, kv_heads * head_dim
    shapes = {"wq": (q, hidden), "wk": (kv_width, hidden), "wv": (kv_width, hidden), "wo": (hidden, q), "n1": (hidden,), "n2": (hidden,)}
    shapes |= {"wg": (inner, hidden), "wu": (inner, hidden), "wd": (hidden, inner)}
    params = {"embed": leaf(vocab, hidden), "norm": leaf(hidden), "layers": {k: leaf(layers, *s) for k, s in shapes.items()}}
    kv = (leaf(layers, kv_heads, context, head_dim),) * 2
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    return build_graph(step, params, kv, scalar, scalar)[0]


def llama_1b(context: int = 512) -> OpGraph:
    return llama(hidden=2048, layers=16, heads=32, kv_heads=8, head_dim=64, inner=8192, vocab=128256, context=context)


def llama_8b(context: int = 4096) -> OpGraph:
    return llama(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, inner=14336, vocab=128256, context=context)


def tiny(layers: int = 5) -> OpGraph:
    return llama(hidden=128, layers=layers, heads=4, kv_heads=2, head_dim=64, inner=256, vocab=192, context=128)


def make_graph(segments: list[tuple[int, list[Phase]]], tensors: list[Tensor], context: int = 128) -> OpGraph:
    """A graph of phases alone: all that the search reads."""
    phases = tuple(p for _, ps in segments for p in ps)
    looped = tuple(Segment(phases=tuple(p.name for p in ps), repeats=n) for n, ps in segments)
    return OpGraph(nx.DiGraph(), phases, looped, {t.name: t for t in tensors}, {}, {}, {}, (), context)


@functools.cache
def long_chain(phases: int, rows: int = 1056, repeats: int = 1) -> OpGraph:
    """A model without two phases alike: each fold reads the one before whole, and the one before that by rows. The last writes the state."""
    names = [f"t{i}" for i in range(phases - 1)] + ["x"]
    part = Part(weights=("w",), rows=rows, writes=("x",))
    first = Phase(name="first", kind="fold", segment=0, parts=(part,), reads=(), row_reads=(), k=1024)
    body = [
        Phase(
            name=f"p{i}", kind="fold", segment=1, parts=(Part(weights=(f"w{i}",), rows=rows, writes=(name,)),), k=1024,
            reads=(names[i - 1],), row_reads=tuple(names[i - 2 : i - 1]) if i > 1 else (),
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    return make_graph([(1, [first]), (repeats, body)], [Tensor(name=n, width=rows, carried=n == "x") for n in names])


def free_running() -> OpGraph:
    """A loop in which a phase reads nothing, so that only the order of its own iterations holds it back."""
    x, t, out = Tensor(name="x", width=64, carried=True), Tensor(name="t", width=128), Tensor(name="out", width=128, output=True)

    def phase(name: str, segment: int, tensor: Tensor, reads: tuple[str, ...]) -> Phase:
        part = Part(weights=(), rows=tensor.width, writes=(tensor.name,))
        return Phase(name=name, kind="map", segment=segment, parts=(part,), reads=reads, row_reads=())

    loop = [phase("free", 1, t, ()), phase("state", 1, x, ("x", "t"))]
    return make_graph([(1, [phase("first", 0, x, ())]), (3, loop), (1, [phase("end", 2, out, ("x",))])], [x, t, out])


def _phase(draw, index: int, segment: int, known: list[Tensor], out: Tensor, scale: int) -> tuple[Phase, list[Tensor]]:
    """A random phase that writes `out`, and perhaps more; returns it with all it writes."""
    reads = tuple(draw(st.lists(st.sampled_from([t.name for t in known]), unique=True, max_size=2))) if known else ()
    same_width = [t.name for t in known if t.width == out.width]
    row_reads = tuple(draw(st.lists(st.sampled_from(same_width), unique=True, max_size=2))) if same_width else ()
    name = f"p{index}"
    parts, made = [Part(weights=(f"w{index}",) * draw(st.integers(1, 2)), rows=out.width, writes=(out.name,))], [out]
    if draw(st.booleans()):
        made.append(Tensor(name=f"{out.name}.b", width=64 * scale * draw(st.integers(1, 3))))
        parts.append(Part(weights=(f"v{index}",), rows=made[-1].width, writes=(made[-1].name,)))
    k, parallel, separable = 64 * scale * draw(st.integers(1, 6)), draw(st.booleans()), draw(st.integers(0, 3)) > 0
    if draw(st.integers(0, 3)) == 0:
        parts = [Part(weights=(), rows=p.rows, writes=p.writes) for p in parts]
        return Phase(name=name, kind="map", segment=segment, parts=tuple(parts), reads=reads, row_reads=row_reads), made
    return Phase(
        name=name,
        kind="fold",
        segment=segment,
        parts=tuple(parts),
        reads=reads,
        row_reads=row_reads,
        k=k,
        parallel=parallel,
        separable=separable,
    ), made


def _attention(draw, index: int, segment: int, known: list[Tensor]) -> tuple[Phase, Tensor]:
    heads, kv_heads = draw(st.sampled_from([(2, 2), (4, 2), (3, 1)]))
    out = Tensor(name=f"t{index}", width=heads * 64, heads=heads)
    reads = tuple(t.name for t in known[-2:])
    part = Part(weights=(), rows=out.width, writes=(out.name,))
    phase = Phase(
        name=f"p{index}", kind="attention", segment=segment, parts=(part,), reads=reads, row_reads=(), k=64 * draw(st.integers(1, 3)),
        heads=heads, kv_heads=kv_heads, head_dim=64,
    )  # fmt: skip
    return phase, out


@st.composite
def graphs(draw, max_phases: int = 4, scale: int = 1) -> OpGraph:
    """A first phase that writes the loop state, a loop of random phases the last of which writes it again, and an end that reads it."""
    x = Tensor(name="x", width=64 * scale * draw(st.integers(1, 3)), carried=True)
    tensors, loop = [x], []
    first = Phase(name="first", kind="map", segment=0, parts=(Part(weights=(), rows=x.width, writes=("x",)),), reads=(), row_reads=())
    n = draw(st.integers(1, max_phases))
    for i in range(n - 1):
        if draw(st.integers(0, 2)) == 0:
            phase, out = _attention(draw, i, 1, tensors)
            made = [out]
        else:
            phase, made = _phase(draw, i, 1, tensors, Tensor(name=f"t{i}", width=64 * scale * draw(st.integers(1, 3))), scale)
        loop.append(phase)
        tensors += made
    final, made = _phase(draw, n, 1, tensors, x, scale)
    if not any("x" in p.reads for p in loop):  # someone reads the whole state, or nothing orders its first instance before the next ones
        final = dataclasses.replace(final, reads=("x", *(t for t in final.reads if t != "x")))
    tensors += made[1:]
    if draw(st.booleans()):  # the state may be written before the loop's end
        loop.insert(draw(st.integers(0, len(loop))), final) if not set(final.reads + final.row_reads) - {"x"} else loop.append(final)
    else:
        loop.append(final)
    out = Tensor(name="out", width=128, output=True)
    head = Phase(
        name="head", kind="fold", segment=2, parts=(Part(weights=("h",), rows=128, writes=("out",)),), reads=("x",), row_reads=(), k=x.width
    )
    repeats = draw(st.sampled_from([1, 2, 3, 7]))
    return make_graph([(1, [first]), (repeats, loop), (1, [head])], [*tensors, out])
