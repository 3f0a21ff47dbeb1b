"""Decode steps become fused phases; what has no tile lowering is refused with the user's line and a remedy."""

import jax
import jax.numpy as jnp
import pytest

import mkdsl as mk
from mkdsl.graph import build_graph
from mkdsl.models import SHAPES, abstract_params, decode_step, init_cache

INT = jax.ShapeDtypeStruct((), jnp.int32)


def w(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def graph_of(f, params, kv=()):
    return build_graph(f, params, kv, INT, INT)[0]


@pytest.fixture(scope="module")
def llama():
    config = SHAPES["llama-3.2-1b"]
    return graph_of(decode_step(config), abstract_params(config), jax.eval_shape(lambda: init_cache(config, 512)))


def test_llama_is_five_phases_a_layer(llama):
    assert [s.repeats for s in llama.segments] == [1, 16, 1]
    assert llama.segments[1].phases == ("wq+wk+wv", "attention", "wo", "wg·wu", "wd")


def test_gate_and_up_are_zipped_and_q_k_v_are_not(llama):
    assert [p.weights for p in llama.phase("wg·wu").parts] == [("wg", "wu")]
    assert [p.weights for p in llama.phase("wq+wk+wv").parts] == [("wq",), ("wk",), ("wv",)]


def test_what_crosses_phases(llama):
    assert llama.phase("wo").writes == ("wo",)
    assert llama.phase("wo").row_reads == ("x",)
    assert llama.phase("wd").reads == ("wg·wu",)  # the norm's 1/rms stays at gate and up
    assert llama.phase("wd").row_reads == ("wo",)
    assert llama.phase("wd").writes == ("x",)
    assert llama.tensors["x"].carried
    assert llama.tensors["wg·wu"].rounds and llama.tensors["attention"].rounds and not llama.tensors["wo"].rounds
    assert llama.tensors["embed.out"].output


def test_rms_norm_leaves_the_operand(llama):
    """The resident of q, k and v is x times the norm's weight: 1/rms multiplies the finished rows."""
    code = llama.code["wq+wk+wv"]
    below = [llama.node(i) for i in llama.node(code.resident).inputs]
    assert {n.kind for n in below} == {"carry", "map"}
    assert len(code.stats) == 1


def test_streamed_bytes(llama):
    total = sum(llama.iterations(p) * p.streamed_bytes(1) for p in llama.phases if p.kind == "fold")
    assert total == 2 * (16 * (2048 * (2048 + 1024 + 2048 + 3 * 8192)) + 128256 * 2048)


@pytest.mark.parametrize("call", [jax.jit, jax.checkpoint, lambda f: jax.named_call(f, name="f")])
def test_calls_are_inlined(call):
    """Regression: what jax.checkpoint wraps was refused."""
    half = call(lambda x: jnp.tanh(x) / 2)
    graph = graph_of(lambda p, kv, t, pos: (half(mk.linear(p["w"], half(mk.embed(p["w"], t)))), kv), {"w": w(64, 64)})
    assert [p.name for p in graph.phases] == ["w"]


REFUSED = {
    "matmul": (lambda p, kv, t, pos: (p["w"].astype(jnp.float32) @ mk.embed(p["e"], t), kv), r"dot_general.*mk\.linear"),
    "slice": (lambda p, kv, t, pos: (mk.embed(p["e"], t)[:32], kv), "slice"),
    "cumsum": (
        lambda p, kv, t, pos: (jnp.cumsum(mk.linear(p["w"], mk.embed(p["e"], t))), kv),
        "a running sum is mk.linear with a triangular",
    ),
    "computed weight": (lambda p, kv, t, pos: (mk.linear(p["w"] * 2, mk.embed(p["e"], t)), kv), "is computed.*leaf of params"),
    "float32 weight": (lambda p, kv, t, pos: (mk.linear(p["f"], mk.embed(p["e"], t)), kv), r"float32\[64, 64\]; kernels stream bfloat16"),
    "scalar output": (lambda p, kv, t, pos: (jnp.sum(mk.linear(p["w"], mk.embed(p["e"], t))), kv), "the decode step returns"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_line_and_the_remedy(case):
    f, message = REFUSED[case]
    params = {"e": w(64, 64), "w": w(64, 64), "f": w(64, 64, dtype=jnp.float32)}
    with pytest.raises(mk.UnsupportedError, match=message) as error:
        graph_of(f, params)
    assert f"test_graph.py:{f.__code__.co_firstlineno}" in str(error.value)


def test_append_without_attention_is_refused():
    def f(p, kv, t, pos):
        k = mk.heads(mk.linear(p["w"], mk.embed(p["w"], t)), 1)
        return mk.append(kv, k, k, pos)

    with pytest.raises(mk.UnsupportedError, match=r"mk\.append without an mk\.attention"):
        graph_of(f, {"w": w(64, 64)}, (w(1, 64, 64), w(1, 64, 64)))


def test_attention_without_append_is_refused():
    def f(p, kv, t, pos):
        return mk.attention(mk.heads(mk.linear(p["w"], mk.embed(p["w"], t)), 1), kv, pos), kv

    with pytest.raises(mk.UnsupportedError, match=r"call kv = mk\.append"):
        graph_of(f, {"w": w(64, 64)}, (w(1, 64, 64), w(1, 64, 64)))
