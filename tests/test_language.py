"""docs/language.md is true: its lists are the code's, and each of its rows is tried."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import mkdsl as mk
from mkdsl.graph import OpGraph, build_graph
from mkdsl.graph._elementwise import COMPOSED, KNOWN

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "language.md").read_text(encoding="utf-8")


def leaf(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = {
    "table": leaf(192, 128),
    "w": leaf(192, 128),
    "wq": leaf(128, 128),
    "wo": leaf(192, 128),
    "bias": leaf(192),
    "down": leaf(4, 128),
    "up": leaf(192, 4),
    "temperature": leaf(),
    "scale": leaf(64),
}
KV = {name: leaf(2, 64, 64) for name in "kv"}
INT = leaf(dtype="int32")


def rows(heading: str) -> list[list[str]]:
    """A section's table: the cells of each row."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section is not None
    table = [line.strip("| ").split(" | ") for line in section[1].splitlines() if line.startswith("|")]
    return table[2:]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def build(expression: str, params=PARAMS) -> OpGraph:
    """The graph of a step that returns an expression of the names that the page says."""

    def step(params, kv, token, pos):
        x = mk.embed(params["table"], token)
        y = mk.linear(params["w"], x)

        def attend(at=pos, up_to=pos, turn=lambda x: mk.rope(x, pos)):
            q, k, v = (mk.heads(mk.linear(params["wq"], x), 2) for _ in "qkv")
            appended = mk.append(kv, turn(k), v, at)
            return mk.linear(params["wo"], mk.attention(turn(q), appended, up_to)), appended

        names = {
            "x": x,
            "y": y,
            "p": params,
            "token": token,
            "pos": pos,
            "attend": attend,
            "kv": kv,
            "jax": jax,
            "jnp": jnp,
            "lax": lax,
            "mk": mk,
        }
        return y, eval(compile(expression, "language.md", "eval"), names)

    return build_graph(step, params, KV, INT, INT)[0]


@pytest.mark.parametrize(("name", "listed"), [("KNOWN", KNOWN), ("COMPOSED", set(COMPOSED))])
def test_the_primitives_are_the_codes(name, listed):
    found = re.search(rf"<!-- {name} -->\n```text\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    assert found[1].split() == sorted(listed)


def test_the_operators_are_all_there():
    named = {word for operator, *_ in rows("Operators") for word in re.findall(r"mk\.(\w+)\(", operator)}
    scalings = {name for name in mk.__all__ if name.endswith("Scaling")}
    assert named == set(mk.__all__) - {*scalings, "UnsupportedError", "batch_axes", "dot", "jit", "prefill", "tile"}


@pytest.mark.parametrize(
    "expression",
    [
        e
        for heading in (
            "Elementwise code",
            "Several projections in one weight",
            "Numbers that are known before the kernel starts",
            "Rotary embedding",
            "What a step returns",
        )
        for row in rows(heading)
        for e in code(row[0])
    ],
)
def test_what_may_be_written(expression):
    build(f"({expression})")


def test_every_scaling_has_a_row():
    written = " ".join(e for row in rows("Rotary embedding") for e in code(row[0]))
    assert set(re.findall(r"mk\.(\w+Scaling)", written)) == {name for name in mk.__all__ if name.endswith("Scaling")}


@pytest.mark.parametrize(("expression", "says"), [(e, code(row[1])[0]) for row in rows("What is refused") for e in code(row[0])])
def test_what_is_refused(expression, says):
    with pytest.raises(mk.UnsupportedError, match=rf"language\.md:1.*{re.escape(says)}"):
        build(expression)


TRIED = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "uint32", "bool", "int8", "uint8", "int16", "uint16")
KINDS = {
    "a weight": ("w", "y"),
    "a table": ("table", "y"),
    "a vector": ("v", "y * p['v'].astype(jnp.float32)"),
    "a number": ("n", "y * p['n'].astype(jnp.float32)"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_types(kind):
    listed = next(row[1] for row in rows("Types") if row[0].startswith(kind))
    name, expression = KINDS[kind]
    shapes = {name: leaf.shape for name, leaf in PARAMS.items()} | {"v": (192,), "n": ()}
    taken = []
    for dtype in TRIED:
        try:
            build(expression, PARAMS | {name: leaf(*shapes[name], dtype=dtype)})
            taken.append(dtype)
        except (mk.UnsupportedError, ValueError):
            pass
    assert taken == (list(TRIED) if listed == "any" else [d for d in TRIED if d in code(listed)])


def largest(carry, tile, x):
    return jnp.maximum(carry, jnp.max(tile * x, axis=-1))


def build_sized(rows=128, hidden=128, context=64, head_dim=64, heads=2, k=128, batch=1, size=None):
    """A step with all that has a size, on a whole cache, or on pages of a size."""

    def step(params, kv, token, pos):
        x = mk.embed(params["table"], token)
        q, new, v = (mk.heads(mk.linear(params[w], x), n) for w, n in (("wq", heads), ("wk", 2), ("wk", 2)))
        kv = mk.append(kv, new, v, pos)
        x = mk.linear(params["wo"], mk.attention(q, kv, pos))
        x = mk.fold(largest, params["own"], mk.linear(params["k"], x), init=-jnp.inf, merge=jnp.maximum)
        return mk.linear(params["out"], x), kv

    shapes = {
        "table": (128, hidden), "wq": (heads * head_dim, hidden), "wk": (2 * head_dim, hidden), "wo": (rows, heads * head_dim), "k": (k, rows),
        "own": (64, k), "out": (rows, 64),
    }  # fmt: skip
    kv = {name: leaf(batch, 2, context, head_dim) for name in "kv"}
    if size:
        kv = mk.Paged({name: leaf(9, 2, size, head_dim) for name in "kv"}, leaf(batch, 3, dtype="int32"))
    params = {name: leaf(*shape) for name, shape in shapes.items()}
    return mk.jit(step, batch=batch, target="h200").trace(params, kv, *(leaf(batch, dtype="int32") for _ in range(2)))


def numbers(cell: str) -> list[int]:
    return list(map(int, re.findall(r"\d+", cell)))


@pytest.mark.parametrize(("size", "n"), [(code(row[0])[0], n) for row in rows("Sizes") for n in numbers(row[2])])
def test_sizes(size, n):
    build_sized(**{size: n})


@pytest.mark.parametrize(("size", "n"), [(code(row[0])[0], n) for row in rows("Sizes") for n in numbers("".join(row[3:]))])
def test_sizes_that_are_refused(size, n):
    with pytest.raises((mk.UnsupportedError, ValueError), match=f"{size}={n}"):
        build_sized(**{size: n})
