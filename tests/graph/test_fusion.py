"""What becomes of a decode step: phases, their parts, what crosses between them, and what does not have to."""

import jax
import jax.numpy as jnp
import pytest
import tiny_decoders as tiny

import mkdsl as mk
from mkdsl import models
from mkdsl.graph import build_graph

SCALAR = jax.ShapeDtypeStruct((), jnp.int32)


def graph_of(decoder, context=64):
    return build_graph(decoder.step, decoder.params, decoder.cache(context), SCALAR, SCALAR)[0]


def shape_graph(name, context=64):
    config = models.SHAPES[name]
    kv = jax.eval_shape(lambda: models.init_cache(config, context))
    return build_graph(models.decode_step(config), models.abstract_params(config), kv, SCALAR, SCALAR)[0]


def phases(graph):
    return [p.name for p in graph.phases]


def crossing(graph):
    """{tensor: its readers}, of tensors that are not handed to the caller."""
    readers = {t.name: [] for t in graph.tensors.values() if not t.output}
    for p in graph.phases:
        for name in dict.fromkeys((*p.reads, *p.row_reads)):
            readers[name].append(p.name)
    return readers


def test_llama():
    graph = shape_graph("llama-3.2-1b")
    assert phases(graph) == ["map", "wq+wk+wv", "attention", "wo", "wg·wu", "wd", "embed"]
    assert [(s.repeats, len(s.phases)) for s in graph.segments] == [(1, 1), (16, 5), (1, 1)]
    assert crossing(graph) == {
        "x": ["wq+wk+wv", "wo", "embed"],
        "wq": ["attention"],
        "wk": ["attention"],
        "wv": ["attention"],
        "attention": ["wo"],
        "wo": ["wg·wu", "wd"],
        "wg·wu": ["wd"],
    }
    assert {t.name for t in graph.tensors.values() if t.carried} == {"x"}
    assert {t.name for t in graph.tensors.values() if t.output} == {"embed.out"}


def test_gate_and_up_are_zipped_and_qkv_are_not():
    graph = shape_graph("llama-3.2-1b")
    assert [(p.weights, p.rows, p.writes) for p in graph.phase("wg·wu").parts] == [(("wg", "wu"), 8192, ("wg·wu",))]
    assert [(p.weights, p.rows) for p in graph.phase("wq+wk+wv").parts] == [(("wq",), 2048), (("wk",), 512), (("wv",), 512)]


def test_what_is_only_staged_crosses_in_bfloat16():
    graph = shape_graph("llama-3.2-1b")
    assert {t.name for t in graph.tensors.values() if t.rounds} == {"attention", "wg·wu"}


def test_phases_that_do_not_depend_on_each_other_come_in_any_order():
    """Attention and MLP side by side: whichever fold comes last adds the residual and the other's result."""

    def layer(x, p, kv, pos):
        h = mk.rms_norm(x)
        q, k, v = (mk.heads(mk.linear(p[w], h), n) for w, n in (("wq", 2), ("wk", 1), ("wv", 1)))
        kv = mk.append(kv, k, v, pos)
        return x + mk.linear(p["wo"], mk.attention(q, kv, pos)) + mk.linear(p["wd"], jax.nn.relu(mk.linear(p["wu"], h))), kv

    def step(params, kv, token, pos):
        x = mk.embed(params["embed"], token)
        x, kv = mk.layers(layer, x, params["layers"], kv, pos)
        return mk.linear(params["embed"], x), kv

    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    layers = {name: leaf(2, *shape) for name, shape in {"wq": (128, 64), "wk": (64, 64), "wv": (64, 64), "wo": (64, 128)}.items()}
    params = {"embed": leaf(128, 64), "layers": layers | {"wu": leaf(2, 192, 64), "wd": leaf(2, 64, 192)}}
    kv = tuple(leaf(2, 1, 64, 64) for _ in range(2))
    graph = build_graph(step, params, kv, SCALAR, SCALAR)[0]
    found = (graph, *graph.others)
    loops = [g.segments[1].phases[1:] for g in found]
    assert set(loops) == {("attention", "wd", "wo"), ("attention", "wo", "wd"), ("wd", "attention", "wo")}
    assert len(loops) == 3
    for g in found:
        last = g.phase(g.segments[1].phases[-1])
        assert last.writes == ("x",)
        assert last.row_reads == {"wd": ("wo",), "wo": ("wd", "x")}[last.name]
        assert graph.in_order(tuple(g.order)) is g
    assert graph.in_order(("wd",)) is graph
    assert not shape_graph("llama-3.2-1b").others


def test_residuals_are_read_by_rows():
    graph = shape_graph("llama-3.2-1b")
    assert (graph.phase("wo").reads, graph.phase("wo").row_reads) == (("attention",), ("x",))
    assert (graph.phase("wd").reads, graph.phase("wd").row_reads) == (("wg·wu",), ("wo",))


@pytest.mark.parametrize("phase", ["wq+wk+wv", "wg·wu", "embed"])
def test_one_over_rms_is_pulled_out_of_the_fold(phase):
    """The staged operand is x * weight; the reduction is needed by the finish alone."""
    graph = shape_graph("llama-3.2-1b")
    code = graph.code[phase]
    assert code.resident is not None
    above, stack = set(), [code.resident]
    while stack:
        id = stack.pop()
        above.add(graph.node(id).kind)
        stack += [] if id in graph.tensor_of else graph.node(id).inputs
    assert "reduce" not in above
    assert len(code.stats) == 1


def test_bytes_and_flops_are_the_weights():
    config = models.SHAPES["llama-3.2-1b"]
    graph = shape_graph("llama-3.2-1b", context=128)
    streamed = sum(p.streamed_bytes(3) * graph.iterations(p) for p in graph.phases)
    matrices = sum(a.size for a in jax.tree.leaves(models.abstract_params(config)) if a.shape[-1] > 1 and a.ndim > 1 + (a.shape[0] == 16))
    cache = 3 * 2 * config.layers * config.kv_heads * 128 * config.head_dim
    assert streamed == 2 * (matrices + cache)
    assert sum(p.flops(3) * graph.iterations(p) for p in graph.phases if p.kind == "fold") == 2 * 3 * matrices


def test_qwen3_normalises_heads_inside_attention():
    graph = shape_graph("qwen3-0.6b")
    assert phases(graph) == ["map", "wq+wk+wv", "attention", "wo", "wg·wu", "wd", "embed"]
    attention = graph.phase("attention")
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.context) == (16, 8, 128, 64)
    assert graph.phase("wo").k == 2048 != graph.tensors["x"].width


def test_untied_head_and_no_stats_left_out():
    assert phases(graph_of(tiny.of(tiny.LLAMA)))[-1] == "lm_head"


def test_parallel_block_is_one_fold_of_four_siblings():
    graph = graph_of(tiny.parallel())
    assert phases(graph) == ["map", "wq+wk+wv+wi", "wd", "attention", "wo", "head"]
    assert graph.phase("wo").row_reads == ("wd", "x")
    assert len(graph.code["wq+wk+wv+wi"].stats) == 2  # layer norm's mean and variance


def test_gemma_like_norms_after_a_fold_become_their_readers():
    graph = graph_of(tiny.gemma())
    assert phases(graph) == ["map", "wq+wk+wv", "attention", "wo", "wg·wu", "wd", "map.2", "embed"]
    assert graph.phase("attention").window == 50
    assert (graph.phase("wg·wu").reads, len(graph.code["wg·wu"].stats)) == (("wo", "x"), 2)  # of wo's result, then of their sum
    assert graph.phase("map.2").parts[0].writes == ("x",)


def own_distance(acc, tile, x):
    return acc + ((tile - x) ** 2).sum(-1)


def test_a_fold_of_ones_own_is_not_cut_into_parts():
    def step(params, kv, token, pos):
        logits = mk.fold(own_distance, params["codebook"], mk.embed(params["embed"], token), name="distance")
        return mk.argmax(-logits), -logits, kv

    params = {"codebook": jax.ShapeDtypeStruct((192, 64), jnp.bfloat16), "embed": jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)}
    graph, _ = build_graph(step, params, (), SCALAR, SCALAR)
    assert [(p.name, p.parallel, p.k) for p in graph.phases] == [("codebook", False, 64)]


def test_where_names_the_users_line():
    where = graph_of(tiny.parallel()).phase("wd").where
    assert "tiny_decoders.py" in where
    assert "parallel_layer" in where


def test_graphs_print_and_identify_themselves():
    graph = graph_of(tiny.of(tiny.LLAMA))
    assert "wg·wu: fold k=128 reads wo: wg·wu [192] -> wg·wu" in str(graph)
    assert graph.to_json() == graph_of(tiny.of(tiny.LLAMA)).to_json() != graph_of(tiny.of(tiny.SMOL)).to_json()
