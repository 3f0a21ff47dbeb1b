"""Kinds of decoders: each draws one side of the language in full, and the rest seldom other than plain."""

import dataclasses
from typing import Any

from hypothesis import strategies as st

from grammar.decoders import EXTRAS, FOLDS
from grammar.expressions import NORMS, integers, layer_numbers, numbers, vectors
from grammar.phases import Cuts
from grammar.refused import REFUSED
from grammar.residuals import RESIDUALS, TWO_STREAMS
from grammar.spec import Spec

Fields = dict[str, st.SearchStrategy[Any]]

ON_HEADS = vectors(rows=False, whole=False)
POSITIONS: Fields = {"rope": st.one_of(st.none(), integers), "append": integers, "attend": integers}
RINGS: Fields = {
    "append": st.one_of(
        st.tuples(st.just("%"), st.sampled_from(["pos", ("+", "pos", 5), ("*", "pos", 3)]), st.integers(1, 130)),
        st.tuples(st.just("&"), st.just("pos"), st.sampled_from([7, 31, 63])),
        st.tuples(st.just("-"), st.just("pos"), st.integers(0, 70)),
    ),
    "attend": st.one_of(
        st.tuples(st.sampled_from(["min", "max"]), st.just("pos"), st.integers(0, 127)),
        st.tuples(st.just("clip"), st.just(("+", "pos", 5)), st.integers(0, 127)),
        st.just("pos"),
        st.integers(0, 127),
    ),
    "window": st.one_of(st.none(), st.integers(1, 70)),
}
SCALARS: Fields = {
    "before": st.tuples(st.sampled_from(["+", "*", "max", "/"]), st.just("x"), st.tuples(st.just("number"), numbers)),
    "scale": layer_numbers,
    "query": st.one_of(st.just("x"), st.tuples(st.just("*"), st.just("x"), st.tuples(st.just("number"), layer_numbers))),
    "after": st.tuples(st.sampled_from(["*", "/", "where"]), st.just("x"), st.tuples(st.just("number"), numbers)),
}
ELEMENTWISE: Fields = {
    "before": vectors(), "into": vectors(), "inner": vectors(), "attended": vectors(), "out": vectors(), "after": vectors(),
    "query": ON_HEADS, "keys": ON_HEADS, "values": vectors(whole=False),
}  # fmt: skip
HEADS: Fields = {
    "heads": st.sampled_from([1, 2, 3, 4, 6]),
    "kv_heads": st.sampled_from([1, 2, 3]),
    "head_dim": st.sampled_from([64, 64, 128]),
    "head_norm": st.sampled_from(sorted(NORMS)),
    "bias": st.sampled_from(["none", "none", "vector", "vector", "matrix", "heads", "heads", "numbers"]),
    "turned": st.sampled_from(["heads"] * 4 + ["part", "pairs", "pairs of part", "halves"]),
    "again": st.sampled_from(["none"] * 4 + ["attended"] * 3 + ["appended"]),
    "window": st.sampled_from([None, 1, 5, 64, 100]),
    "softcap": st.sampled_from([None, 0.5, 20.0]),
    "attention_scale": st.sampled_from([None, 0.5, 0.01]),
    "gated": st.booleans(),
    "query": vectors(rows=False),
    "keys": vectors(rows=False),
}
RESIDUAL: Fields = {
    "residual": st.sampled_from(sorted(RESIDUALS)),
    "norm": st.sampled_from(sorted(NORMS)),
    "mlp": st.sampled_from(["none", "plain", "gated"]),
    "scale": layer_numbers,
    "into": st.sampled_from(["x", ("norm", "rms", "x"), ("softmax", "x"), ("mul", "x"), ("over its size", "x"), ("times its mean", "x")]),
    "attended": st.sampled_from(["x", ("norm", "rms", "x"), ("norm", "layer", "x"), ("mul", ("norm", "bare", "x"))]),
    "out": st.sampled_from(["x", ("norm", "l2", "x"), ("tanh", "x")]),
}
STACKS: Fields = {
    "stacks": st.lists(st.integers(1, 3), max_size=2).map(tuple),
    "unrolled": st.integers(0, 2),
    "residual": st.sampled_from(["pre", "parallel", *TWO_STREAMS]),
    "mlp": st.sampled_from(["none", "plain"]),
    "before": st.sampled_from(["x", ("norm", "rms", "x"), ("tanh", "x"), ("vector",), ("row", "pos")]),
    "lean": st.sampled_from([0, 0, 1, 2]),
}
OUTPUTS: Fields = {
    "extra": st.lists(st.sampled_from(sorted(EXTRAS)), max_size=3, unique=True).map(tuple),
    "after": vectors(of_layer=False),
    "tied": st.booleans(),
    "norm": st.sampled_from(sorted(NORMS)),
    "stacks": st.sampled_from([(), (1,), (2,)]),
}
OWN_FOLDS: Fields = {
    "fold": st.sampled_from(sorted(set(FOLDS) - {"none"})),
    "fold_at": st.sampled_from(["head", "inner"]),
    "inner": vectors(leaves=2),
    "after": vectors(leaves=2),
    "mlp": st.sampled_from(["plain", "gated"]),
}
FUSED: Fields = {
    "fused": st.sampled_from(["split", "sliced", "weight", "heads"]),
    "mlp": st.sampled_from(["plain", "gated", "gated"]),
    "bias": st.sampled_from(["none", "vector", "heads"]),
    "width": st.sampled_from([60, 64, 128, 200]),
    "heads": st.sampled_from([1, 2, 3]),
}
STREAMS: Fields = {"residual": st.sampled_from(TWO_STREAMS), "stacks": st.sampled_from([(1,), (2,), (3,), (2, 2)])}
SIZES: Fields = {
    "hidden": st.sampled_from([64, 80, 100, 128, 192]),
    "head_dim": st.sampled_from([48, 64, 80, 96, 112, 192]),
    "width": st.sampled_from([64, 72, 96, 128, 200]),
    "vocab": st.sampled_from([64, 65, 100, 192]),
    "context": st.sampled_from([40, 64, 100, 128, 136]),
    "heads": st.sampled_from([1, 2, 3]),
}
EVERYTHING: Fields = {**ELEMENTWISE, **SCALARS, **HEADS, **RESIDUAL, **STACKS, **OUTPUTS, **OWN_FOLDS, **POSITIONS}
SIZED: Fields = {
    "hidden": st.sampled_from([64, 80, 128, 192]),
    "vocab": st.sampled_from([64, 67, 128]),
    "context": st.sampled_from([64, 72, 128]),
    "again": st.sampled_from(["none", "attended"]),
}


@st.composite
def specs(draw: st.DrawFn, always: Fields, others: Fields, least: int = 0, most: int = 2) -> Spec:
    """A spec with some of its fields drawn, and some of the others."""
    fields = {name: draw(strategy) for name, strategy in always.items()}
    for name in draw(st.lists(st.sampled_from(sorted(others)), min_size=least, max_size=most, unique=True)):
        fields.setdefault(name, draw(others[name]))
    heads, kv_heads = fields.get("heads", 2), fields.get("kv_heads", 1)
    return Spec(**fields | {"heads": heads * kv_heads if heads % kv_heads else heads})


@st.composite
def refused(draw: st.DrawFn) -> Spec:
    """A spec that may be whatever it likes but for one thing."""
    spec = draw(specs(SIZED, RESIDUAL))
    return dataclasses.replace(
        spec,
        stacks=(draw(st.integers(1, 2)),),
        forbidden=(draw(st.sampled_from(sorted(REFUSED))), draw(st.sampled_from(["first", "last"]))),
    )


FAMILIES: dict[str, st.SearchStrategy[Spec]] = {
    "positions": specs(POSITIONS, SIZED),
    "rings": specs(RINGS, SIZED),
    "scalars": specs(SCALARS, SIZED),
    "elementwise": specs({}, ELEMENTWISE, 1, 3),
    "heads": specs(HEADS, SIZED),
    "residuals": specs(RESIDUAL, SIZED),
    "streams": specs(STREAMS, RESIDUAL, 1, 3),
    "stacks": specs(STACKS, SIZED),
    "outputs": specs(OUTPUTS, SIZED),
    "folds of one's own": specs(OWN_FOLDS, SIZED),
    "sizes": specs(SIZES, RESIDUAL),
    "everything": specs({}, EVERYTHING, 4, 8),
    "fused": specs(FUSED, {**HEADS, **RESIDUAL, **SIZED}),
    "refused": refused(),
}

cuts = st.builds(
    Cuts, rows=st.sampled_from([8, 16, 32, 64]), split_k=st.sampled_from([1, 2, 4, 8]), tile_k=st.sampled_from([16, 32, 48, 64, 256]),
    block=st.sampled_from([16, 64, 128]), splits=st.sampled_from([1, 2, 3]),
)  # fmt: skip
EDGES = (0, 1, 5, 62, 63, 64, 65, 100, 127, 128, 200)
positions = st.lists(st.sampled_from(EDGES), min_size=1, max_size=2, unique=True)
