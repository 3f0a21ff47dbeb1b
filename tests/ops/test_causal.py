"""Attention of many tokens at once, against `mk.attention` of each by itself; and what is done of it with cuDNN, against a stand-in for cuDNN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.cudnn.fused_attention_stablehlo import MaskType
from jax.experimental.custom_partitioning import custom_partitioning
from laws import LAW

import mkdsl as mk
from mkdsl.ops import Attention, _causal
from mkdsl.ops._causal import BLOCK, Causal, anywhere, blocked, side_by_side

KV_HEADS, HEADS, HEAD_DIM = 2, 4, 8
few = settings(LAW, max_examples=12)


def drawn(seed, n, context, *, dtype=jnp.float32, sequences=()):
    """q [.., n, heads, head_dim], and keys and values [.., kv_heads, context, head_dim]."""
    rng = np.random.default_rng(seed)
    shapes = (n, HEADS, HEAD_DIM), (KV_HEADS, context, HEAD_DIM), (KV_HEADS, context, HEAD_DIM)
    return [jnp.asarray(rng.standard_normal((*sequences, *shape), np.float32), dtype) for shape in shapes]


def each(one, q, k, v, positions):
    """Every token by itself, with all of the cache's scores."""
    return jax.vmap(one.reference, (0, None, None, 0))(q, k, v, positions)[0]


def close(found, expected, atol=1e-5):
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=atol)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("context", "block", "one"),
    [
        (1, 4, Attention(0.3)),
        (20, 7, Attention(0.3)),
        (20, 64, Attention(0.3, 100)),
        (20, 4, Attention(0.3, 3, 2.0)),
        (20, 1, Attention(0.3, 1)),
    ],
)
def test_blocks_add_up(context, block, one):
    """Wherever the tokens stand: in any order, and past the cache."""
    both = jax.jit(lambda *a: (Causal(one, block=block).bind(*(x[None] for x in a))[0][0], each(one, *a)))

    @few
    @given(positions=st.lists(st.integers(0, context + 1), min_size=6, max_size=6), seed=st.integers(0, 9))
    def law(positions, seed):
        close(*both(*drawn(seed, 6, context), np.array(positions, np.int32)))

    law()


@pytest.mark.medium
def test_no_more_is_read_than_is_filled():
    """Nothing times NaN would be NaN."""
    q, k, v = drawn(0, 3, 4 * 16)
    positions = jnp.array([20, 21, 22])
    untouched = jnp.full_like(k, jnp.nan).at[:, :32].set(k[:, :32])
    attend = jax.jit(lambda one, *args: blocked(one, *args, block=16), static_argnums=0)
    found = attend(Attention(0.3), q, untouched, v.at[:, 32:].set(jnp.nan), positions)
    close(found, each(Attention(0.3), q, k, v, positions))
    found = attend(Attention(0.3, window=3), q, untouched.at[:, :16].set(jnp.nan), v.at[:, 32:].set(jnp.nan), positions)
    close(found, each(Attention(0.3, window=3), q, k, v, positions))


@pytest.mark.medium
def test_scores_are_never_all_in_memory():
    n = 16 * BLOCK
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((1, n, HEADS, HEAD_DIM), (1, KV_HEADS, n, HEAD_DIM), (1, KV_HEADS, n, HEAD_DIM))
    ]
    compiled = jax.jit(Causal(Attention(0.3)).bind).lower(*args, jax.ShapeDtypeStruct((1, n), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < HEADS * n * n * 4 / 2


@pytest.mark.medium
def test_several_sequences_at_once():
    args = drawn(1, 5, 12, sequences=(3,))
    positions = jnp.arange(5) + jnp.array([0, 4, 7])[:, None]

    def attend(q, k, v, positions):
        step = lambda q, kv, token, pos: (mk.attention(q[token], kv, pos), kv)  # noqa: E731
        return mk.prefill(step)(q, (k, v), jnp.arange(5), positions)[0]

    found = jax.jit(jax.vmap(attend))(*args, positions)
    for i in range(3):
        close(found[i], each(Attention(HEAD_DIM**-0.5), *(a[i] for a in args), positions[i]))


def plain_cudnn(q, k, v, *, q_seqlen, kv_seqlen, mask_type, scale, qkv_layout, mask=None, return_residual=False):
    """What cuDNN says it computes, with 7 where it says nothing."""
    assert qkv_layout == "BNTH"
    row, column = jnp.arange(q.shape[2])[:, None], jnp.arange(k.shape[2])
    keep = (column < kv_seqlen[:, None, None]) & ((column <= row) | (mask_type is MaskType.PADDING))
    keep = keep[:, None] if mask is None else keep[:, None] & mask
    k, v = (jnp.repeat(a, q.shape[1] // k.shape[1], axis=1) for a in (k, v))
    scores = jnp.where(keep, jnp.einsum("bntd,bnsd->bnts", q, k, preferred_element_type=jnp.float32) * scale, -jnp.inf)
    said = ((row < q_seqlen[:, None, None]) & (kv_seqlen > 0)[:, None, None])[:, None]
    out = jnp.einsum("bnts,bnsd->bntd", jax.nn.softmax(scores, -1), v, preferred_element_type=jnp.float32)
    out, sums = jnp.where(said, out, 7.0).astype(q.dtype), jnp.where(said[..., 0], jax.nn.logsumexp(scores, -1), 7.0)
    return (out, sums) if return_residual else out


@pytest.mark.medium
@pytest.mark.parametrize("context", [1, 20])
def test_what_was_there_and_what_is_new(context, monkeypatch):
    """Two sequences, each of tokens that stand side by side, with pads behind them."""
    monkeypatch.setattr(_causal, "dot_product_attention", plain_cudnn)
    attend, alone = jax.jit(functools.partial(side_by_side, Attention(0.3))), jax.jit(functools.partial(each, Attention(0.3)))

    def positions(start, count):
        return [*range(start, min(start + count, context)), *[context] * 6][:6]

    @few
    @given(starts=st.lists(st.integers(0, context - 1), min_size=2, max_size=2), counts=st.lists(st.integers(1, 6), min_size=2, max_size=2))
    def law(starts, counts):
        (q, k, v), at = drawn(0, 6, context, sequences=(2,)), np.array([*map(positions, starts, counts)], np.int32)
        for found, *args in zip(attend(q, k, v, at), q, k, v, at, strict=True):
            close(found, alone(*args))

    law()


@pytest.mark.medium
@pytest.mark.parametrize("window", [None, 3])
def test_tokens_anywhere_with_cudnn(window, monkeypatch):
    """Two sequences, their tokens in any order, and past the cache."""
    monkeypatch.setattr(_causal, "dot_product_attention", plain_cudnn)
    one = Attention(0.3, window)
    attend, alone = jax.jit(functools.partial(anywhere, one)), jax.jit(functools.partial(each, one))

    @few
    @given(st.lists(st.integers(-1, 21), min_size=12, max_size=12))
    def law(positions):
        (q, k, v), at = drawn(0, 6, 20, sequences=(2,)), np.array(positions, np.int32).reshape(2, 6)
        for found, *args in zip(attend(q, k, v, at), q, k, v, at, strict=True):
            close(found, alone(*args))

    law()


@pytest.mark.parametrize("positions", [[3, 2, 4], [3, 5, 6], [3, 4, 4], [-1, 0, 1], [3, 99, 5]])
def test_tokens_that_do_not_stand_side_by_side(positions, monkeypatch):
    """Where that was promised: it is NaN, from where they do not."""
    monkeypatch.setattr(_causal, "dot_product_attention", plain_cudnn)
    out = side_by_side(Attention(0.3), *drawn(0, 3, 12, sequences=(1,)), jnp.array([positions]))
    assert np.isnan(out[0]).any(1).tolist() == [at != max(positions[0], 0) + i for i, at in enumerate(positions)]


@pytest.mark.medium
@pytest.mark.parametrize("one", [Attention(0.3), Attention(0.3, window=3), Attention(0.3, softcap=2.0)])
@pytest.mark.parametrize(("dtype", "ascending"), [(jnp.bfloat16, True), (jnp.bfloat16, False), (jnp.float32, True)])
def test_what_cudnn_is_asked_for(one, dtype, ascending, monkeypatch):
    """On a GPU: twice without a mask in memory, once with one; and it has no soft-cap and no float32."""
    asked = []

    def ask(*args, mask=None, **options):
        asked.append(mask is not None)
        return plain_cudnn(*args, mask=mask, **options)

    monkeypatch.setattr(_causal, "dot_product_attention", ask)
    args, positions = drawn(0, 3, 12, sequences=(1,), dtype=dtype), jnp.array([[4, 5, 6]])
    (found,) = jax.jit(Causal(one, ascending=ascending).on_cuda)(*args, positions)
    takes = dtype == jnp.bfloat16 and one.softcap is None
    assert asked == (([False, False] if ascending and one.window is None else [True]) if takes else [])
    close(found[0], each(one, *(a[0] for a in args), positions[0]), atol=2e-2)


def test_shapes_that_cudnn_does_not_take(monkeypatch):
    def refuse(*args, **options):
        raise NotImplementedError

    monkeypatch.setattr(_causal, "dot_product_attention", refuse)
    args, positions = drawn(0, 3, 12, sequences=(1,), dtype=jnp.bfloat16), jnp.array([[4, 5, 6]])
    (found,) = jax.jit(Causal(Attention(0.3)).on_cuda)(*args, positions)
    close(found[0], each(Attention(0.3), *(a[0] for a in args), positions[0]), atol=2e-2)


@pytest.mark.medium
def test_a_cache_in_pages():
    """A whole decode step's prefill through a table, and that of two sequences in the same pages."""
    rng = np.random.default_rng(5)
    pages = [jnp.asarray(rng.standard_normal((9, KV_HEADS, 4, HEAD_DIM), np.float32)) for _ in "kv"]
    new = jnp.asarray(rng.standard_normal((2, 5, HEAD_DIM), np.float32))

    def step(q, kv, token, pos):
        kv = mk.append(kv, q[token][:KV_HEADS], q[token][-KV_HEADS:], pos)
        return mk.attention(q[token], kv, pos), kv

    tables, tokens, positions = jnp.array([[7, 2, 0], [4, 8, 5]]), jnp.arange(5), jnp.arange(5) + jnp.array([[3], [6]])
    q = jnp.repeat(new[:, :, None], HEADS, 2)
    several = jax.vmap(mk.prefill(step), (0, mk.batch_axes(mk.Paged(pages, tables)), 0, 0), (0, mk.batch_axes(mk.Paged(pages, tables))))
    found, after = jax.jit(several)(q, mk.Paged(pages, tables), jnp.stack([tokens, tokens]), positions)
    for i in range(2):
        kv = [jnp.moveaxis(leaf[tables[i]], 0, 1).reshape(KV_HEADS, 12, HEAD_DIM) for leaf in pages]
        expected, kv = jax.jit(mk.prefill(step))(q[i], kv, tokens, positions[i])
        close(found[i], expected)
        for leaf, cache in zip(after.pages, kv, strict=True):
            close(jnp.moveaxis(leaf[tables[i]], 0, 1).reshape(cache.shape), cache)


def test_what_may_be_partitioned_is_lowered_for_a_gpu(monkeypatch):
    """As cuDNN's attention is: it asks for the devices, which JAX hands to those alone that say that they want them."""

    @custom_partitioning
    def partitioned(x):
        return x + 1

    partitioned.def_partition(infer_sharding_from_operands=lambda *_: None, partition=lambda *_: None, sharding_rule="i -> i")
    monkeypatch.setattr(Attention, "on_cuda", lambda self, *args: (partitioned(Attention.reference(self, *args)[0]),))
    (q,), k, v = drawn(0, 1, 6)
    lowered = jax.jit(lambda *args: Attention(0.125).bind(*args)[0]).trace(q, k, v, jnp.int32(3)).lower(lowering_platforms=("cuda",))
    assert "stablehlo.add" in lowered.as_text()
