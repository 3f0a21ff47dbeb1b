"""What has no tile lowering is refused with the primitive, the user's line, the numbers and the remedy."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mkdsl as mk
from mkdsl.graph import build_graph

H = 128


def leaf(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = {
    "embed": leaf(192, H),
    "w": leaf(H, H),
    "narrow": leaf(64, H),
    "stacked": leaf(3, H, H),
    "f32": leaf(H, H, dtype=jnp.float32),
    "f16": leaf(H, H, dtype=jnp.float16),
    "out100": leaf(100, H),
    "in100": leaf(H, 100),
    "q": leaf(64, H),
    "o": leaf(H, 64),
    "q32": leaf(32, H),
    "o32": leaf(H, 32),
    "vector": leaf(H),
    "halves": leaf(2, 64),
    "half": leaf(2, 1),
    "int64ish": leaf(H, dtype=jnp.float8_e5m2),
}


def build(middle, kv=None, head=True):
    """A decode step with something in the middle."""

    def step(params, kv, token, pos):
        x, kv = middle(mk.embed(params["embed"], token), params, kv, token, pos)
        logits = mk.linear(params["embed"], x) if head else x
        return mk.argmax(logits), logits, kv

    scalar = leaf(dtype=jnp.int32)
    return build_graph(step, PARAMS, kv or {n: leaf(1, 64, 64) for n in "kv"}, scalar, scalar)


def plain(f):
    return lambda x, p, kv, token, pos: (f(x, p, token, pos), kv)


GENERIC = "use elementwise jnp, sums over the last axis, or an mk operator"
PRIMITIVES = [
    (lambda x, p, t, pos: p["w"].astype(jnp.float32) @ x, "dot_general(float32[128, 128], float32[128]) -> [128]", "mk.linear, or stream"),
    (lambda x, p, t, pos: x + x[:64].sum(), "slice(float32[128]) -> [64]", "a slice takes neighbouring rows of a projection"),
    (
        lambda x, p, t, pos: x + jnp.concatenate([x, x]).sum(),
        "concatenate(float32[128], float32[128]) -> [256]",
        "project with separate weights",
    ),
    (lambda x, p, t, pos: lax.top_k(x, 128)[0], "top_k(float32[128]) -> [128]", "sample outside the decode step, from its logits"),
    (lambda x, p, t, pos: x * jnp.argmax(x), "argmax(float32[128]) -> []", "use mk.argmax, on the logits"),
    (lambda x, p, t, pos: x[::-1], "rev(float32[128]) -> [128]", "store the weights in the order that is needed"),
    (
        lambda x, p, t, pos: jax.random.normal(jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32) + pos.astype(jnp.uint32)), (H,)),
        "random_wrap(",
        "draw random numbers outside the decode step",
    ),
    (lambda x, p, t, pos: lax.cond(pos > 3, jnp.sin, jnp.cos, x), "cond(int32[], float32[128]) -> [128]", "blend with jnp.where"),
    (
        lambda x, p, t, pos: lax.while_loop(lambda x: x[0] < 1, lambda x: x + 1, x),
        "while(float32[128]) -> [128]",
        "use mk.layers for layers",
    ),
    (
        lambda x, p, t, pos: mk.linear(p["stacked"][t], x),
        "dynamic_slice(bfloat16[3, 128, 128], int32[], int32[], int32[])",
        "use mk.layers",
    ),
    (
        lambda x, p, t, pos: x + jnp.take(x, t),
        "gather(float32[128], int32[1]) -> []",
        "look rows up with mk.embed",
    ),
    (lambda x, p, t, pos: jnp.cumsum(x), "cumsum(float32[128]) -> [128]", "a running sum is mk.linear with a triangular matrix of ones"),
    (lambda x, p, t, pos: x * jnp.argmin(x), "argmin(float32[128]) -> []", "use mk.argmax of the negative, on the logits"),
    (lambda x, p, t, pos: lax.cummax(x), "cummax(float32[128]) -> [128]", "others are an mk.fold of such a matrix"),
    (lambda x, p, t, pos: x * jax.random.uniform(jax.random.key(0), (H,)), "random_seed(int32[]) -> []", "draw random numbers outside"),
    (lambda x, p, t, pos: (jax.debug.print("{}", x), x)[1], "debug_print(float32[128]) -> ", "print and call back outside the decode step"),
    (lambda x, p, t, pos: jax.pure_callback(lambda a: a, x, x), "pure_callback(", "print and call back outside the decode step"),
    (lambda x, p, t, pos: jnp.select([x > 0], [x], 0.0), "stack(", "jnp.select is jnp.where inside jnp.where"),
    (lambda x, p, t, pos: mk.linear(p["w"].T, x), "transpose(bfloat16[128, 128]) -> [128, 128]", "store the weights transposed"),
    (lambda x, p, t, pos: jnp.sort(x), "sort(float32[128]) -> [128]", "sample outside the decode step, from its logits"),
    (lambda x, p, t, pos: x.reshape(2, 64).T.reshape(-1), "transpose(float32[2, 64]) -> [64, 2]", ""),
    (lambda x, p, t, pos: x + x.reshape(2, 64).sum(0).sum(), "reduce_sum(float32[2, 64]) -> [64]", GENERIC),
    (lambda x, p, t, pos: lax.lgamma(x), "lgamma(float32[128]) -> [128]", GENERIC),
]


@pytest.mark.parametrize(("middle", "what", "remedy"), PRIMITIVES, ids=[what.split("(")[0] for _, what, _ in PRIMITIVES])
def test_primitives(middle, what, remedy):
    with pytest.raises(mk.UnsupportedError) as refused:
        build(plain(middle))
    message = str(refused.value)
    line = inspect.getsourcelines(middle)[1]
    assert message.startswith(f"{__file__}:{line}:")
    assert what in message
    assert "has no tile lowering; " in message
    assert remedy in message


def attend(x, p, kv, token, pos, append=True):
    q, k, v = (mk.heads(mk.linear(p["q"], x), 1) for _ in "qkv")
    kv = mk.append(kv, k, v, pos) if append else kv
    return x + mk.linear(p["o"], mk.attention(q, kv, pos)), kv


def not_appended(x, p, kv, token, pos):
    return attend(x, p, kv, token, pos, append=False)


def computed_position(x, p, kv, token, pos):
    return attend(x, p, kv, token, pos + mk.argmax(x))


def not_attended(x, p, kv, token, pos):
    k = mk.heads(mk.linear(p["q"], x), 1)
    return x, mk.append(kv, k, k, pos)


def narrow_heads(x, p, kv, token, pos):
    q, k, v = (mk.heads(mk.linear(p["q32"], x), 1) for _ in "qkv")
    kv = mk.append(kv, k, v, pos)
    return x + mk.linear(p["o32"], mk.attention(q, kv, pos)), kv


def odd_fold(x, p, kv, token, pos):
    def largest(carry, tile, y):
        return jnp.maximum(carry, jnp.max(tile * y, axis=-1))

    return x + mk.fold(largest, p["in100"], mk.linear(p["out100"], x), init=-jnp.inf, merge=jnp.maximum), kv


def on_heads(f):
    """Something done to the queries."""

    def middle(x, p, kv, token, pos):
        q, k, v = (mk.heads(mk.linear(p["q"], x), 1) for _ in "qkv")
        kv = mk.append(kv, k, v, pos)
        return x + mk.linear(p["o"], mk.attention(f(q, p, x), kv, pos)), kv

    return middle


def attention_of_attention(x, p, kv, token, pos):
    q, k, v = (mk.heads(mk.linear(p["q"], x), 1) for _ in "qkv")
    kv = mk.append(kv, k, v, pos)
    again = mk.heads(mk.attention(q, kv, pos), 1)
    return x + mk.linear(p["o"], mk.attention(again, kv, pos)), kv


def norm_of_each_head(x, p, kv, token, pos):
    q, k, v = (mk.heads(mk.linear(p["q"], x), 1) for _ in "qkv")
    kv = mk.append(kv, k, v, pos)
    return x + mk.linear(p["o"], mk.rms_norm(mk.heads(mk.attention(q, kv, pos), 2)).reshape(-1)), kv


def fold_of(step, finish=lambda c: c):
    return plain(lambda x, p, t, pos: mk.fold(lambda c, tile, piece: step(c, tile, piece, x), p["w"], x, finish=finish))


def cache(context=64, head_dim=64, dtype=jnp.bfloat16):
    return {n: leaf(1, context, head_dim, dtype=dtype) for n in "kv"}


OTHERS = {
    "float32 weight": (plain(lambda x, p, t, pos: mk.linear(p["f32"], x)), {}, r"the weight f32 is float32\[128, 128\]; kernels stream bfloat16"),
    "float16 weight": (plain(lambda x, p, t, pos: mk.linear(p["f16"], x)), {}, r"the weight f16 is float16\[128, 128\]; kernels stream bfloat16"),
    "computed weight": (plain(lambda x, p, t, pos: mk.linear(p["w"] * 2, x)), {}, r"the streamed array bfloat16\[128, 128\] is computed \(map\); stream a"),
    "no append": (not_appended, {}, r"attention over a cache that this token was not appended to; call kv = mk.append\(kv, k, v, pos\) first"),
    "computed position": (computed_position, {}, r"at a computed int32\[\] \(map\); an address is an int32 expression of the token, `pos`, constants"),
    "no attention": (not_attended, {}, "mk.append without an mk.attention over the result that the outputs depend on; a kernel writes the cache as it attends"),
    "context": (attend, {"kv": cache(context=100)}, "a cache of context=100 positions; make it one of 104: copies take 8"),
    "narrow heads": (narrow_heads, {"kv": cache(head_dim=32)}, "head_dim=32; kernels have heads of 64 to 256 features, multiples of 16"),
    "a fold of rows": (odd_fold, {}, "folds k=100 elements of each row with a step of its own; such a k is a multiple of 16"),
    "float32 cache": (attend, {"kv": cache(dtype=jnp.float32)}, "the cache is float32; kernels stream a bfloat16 cache"),
    "a vector known before": (
        plain(lambda x, p, t, pos: x * jnp.asarray(np.ones((4, H)) * np.arange(4.0)[:, None])[pos % 4]), {},
        r"makes float32\[1, 128\], known before the kernel starts; a kernel is handed numbers: make one of it, or look a row up with mk.embed"
    ),
    "argmax in the middle": (
        plain(lambda x, p, t, pos: x * mk.argmax(x)), {}, r"argmax\[\] cannot be computed inside embed; mk.argmax is what a decode step returns"
    ),
    "cache in arithmetic": (lambda x, p, kv, t, pos: (x + kv["k"].reshape(-1).sum(), kv), {}, r"cannot be computed inside .*; the cache is read by"),
    "complex numbers": (plain(lambda x, p, t, pos: jnp.abs(x + 1j)), {}, r"complex64\[128\]; a kernel takes float32, bfloat16, .* there: convert it"),
    "a leaf's type": (plain(lambda x, p, t, pos: x * p["int64ish"].astype(jnp.float32)), {}, r"the leaf int64ish is float8_e5m2\[128\]; a kernel takes"),
    "sum of integers": (plain(lambda x, p, t, pos: x * (x > 0).sum()), {}, r"reduce_sum of int32; reductions are of float32: convert with astype"),
    "half of a norm": (norm_of_each_head, {}, r"cannot be computed inside o; arithmetic on \[heads, head_dim\] belongs between"),
    "rows of leaves": (
        plain(lambda x, p, t, pos: x * (p["halves"] * p["half"]).reshape(-1)), {}, r"map\[2, 64\] cannot be computed inside embed; arithmetic on \[heads"
    ),
    "attention of attention": (attention_of_attention, {}, "attention reads another attention's result directly; project it first"),
    "a sum from elsewhere": (on_heads(lambda q, p, x: q * jnp.mean(x)), {}, r"reduce\[\] cannot be computed for attention's heads; apply it before"),
    "a step's primitive": (fold_of(lambda c, tile, piece, x: c + jnp.cumsum(tile, -1)[:, 0]), {}, r"fold's step uses cumsum on \[\(64, 128\)\]; a step is"),
    "a step's view": (fold_of(lambda c, tile, piece, x: c + tile.reshape(-1, 2).sum()), {}, r"fold's step uses reshape on .*; a step is elementwise"),
    "a step's transpose": (fold_of(lambda c, tile, piece, x: c + tile.T.sum(0)), {}, r"fold's step uses transpose on .*; a step is elementwise"),
    "a step's constant": (fold_of(lambda c, tile, piece, x: c + jnp.sum(tile * jnp.arange(128.0), -1)), {}, r"fold's step uses a constant of shape \(128,\)|iota"),
    "a step's surroundings": (fold_of(lambda c, tile, piece, x: c + mk.dot(tile, piece) * x.max()), {}, "fold's step uses a value of the decode step around it"),
    "a finish": (fold_of(lambda c, tile, piece, x: c + mk.dot(tile, piece), jnp.flip), {}, r"fold's step uses rev on \[\(64,\)\]"),
    "integer loop": (plain(lambda x, p, t, pos: lax.fori_loop(0, 3, lambda i, x: i * x, x)), {}, r"the layers carry int32\[\]; they carry float32"),
    "no cache out": (
        plain(lambda x, p, t, pos: x + lax.scan(lambda x, w: (x, x), x, p["stacked"])[1].sum()), {}, "output 0 of the layers is no cache; layers return"
    ),
    "loop over computed": (
        plain(lambda x, p, t, pos: lax.scan(lambda x, w: (x + w, None), x, p["w"] * jnp.float32(2))[0]), {}, "the layers scan over a computed map"
    ),
    "loop in a loop": (
        plain(lambda x, p, t, pos: lax.scan(lambda x, w: (lax.scan(lambda x, v: (x + v, None), x, w)[0], None), x, p["stacked"])[0]),
        {},
        "a scan inside a scan",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("middle", "options", "message"), OTHERS.values(), ids=OTHERS)
def test_shapes_and_structure(middle, options, message):
    with pytest.raises(mk.UnsupportedError, match=message) as refused:
        build(middle, **options)
    assert re.match(rf"{re.escape(__file__)}:\d+:\d+ ", str(refused.value))


def test_what_is_refused_is_what_is_left_out_of_these():
    build(plain(lambda x, p, t, pos: x * jnp.broadcast_to(pos, (H,)) + jnp.full(H, pos) * jnp.repeat(jnp.arange(64) < pos, 2).sum()))
    build(attend)
    build(plain(lambda x, p, t, pos: jax.nn.silu(x) + jax.nn.relu(x) + jax.nn.gelu(x, approximate=True) + jnp.where(x > 0, x, -x)))
    build(plain(lambda x, p, t, pos: jax.nn.softmax(mk.linear(p["w"], x)) * jnp.float32(pos)))


def test_a_number_for_each_of_as_many_heads_as_features():
    """Regression: [64, 1] on 64 heads of 64 features was taken for a feature's weight."""
    params = {"embed": leaf(192, H), "q": leaf(64 * 64, H), "o": leaf(H, 64 * 64), "each": leaf(64)}

    def step(params, kv, token, pos):
        x = mk.embed(params["embed"], token)
        q, k, v = (mk.heads(mk.linear(params["q"], x), 64) for _ in "qkv")
        kv = mk.append(kv, k, v, pos)
        return mk.linear(params["o"], mk.attention(q * params["each"][:, None], kv, pos)), kv

    with pytest.raises(mk.UnsupportedError, match=r"a weight of \[64\] meets heads of 64; store it as \[heads, head_dim\]"):
        build_graph(step, params, {n: leaf(64, 64, 64) for n in "kv"}, leaf(dtype=jnp.int32), leaf(dtype=jnp.int32))
