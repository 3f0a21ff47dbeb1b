"""What the grammar is worth: broken fusion, and broken phases, are found by a few programs of the kind that they concern."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from grammar import phases, pieces
from grammar.law import law
from grammar.phases import Run
from grammar.pieces import Features, Heads, Piece
from hypothesis import Phase

from mkdsl.graph import _build, _elementwise, _rewrite
from mkdsl.graph._fuse import Fuser
from mkdsl.graph._trace import Tracer

pytestmark = pytest.mark.medium

PROGRAMS = 60


def found(kind: str) -> bool:
    """Whether one of the first programs of a kind fails."""
    holds, _ = law(kind, PROGRAMS, phases=(Phase.generate,))
    try:
        holds()
    except Exception:  # an assertion, or whatever broken code runs into
        return True
    return False


# Each breaks one thing: (where, its name, how it is once broken, given what it was).

Broken = tuple[Any, str, Callable[[Any], Any]]


def without_scale(tracer: Any, fold: Any, resident: int, scalar: int) -> None:
    _rewrite._replace_input(tracer, fold.id, fold.inputs[1], resident)


def exchanged(step: Any) -> Any:
    def made(dag: Any, repeats: Any, carries: Any, *rest: Any) -> Any:
        ends = [final for *_, final in carries][::-1]
        return step(dag, repeats, tuple((c, i, end) for (c, i, _), end in zip(carries, ends, strict=True)), *rest)

    return made


GRAPH: dict[str, tuple[str, Broken]] = {
    "all tensors cross as bfloat16": ("residuals", (Fuser, "_rounded", lambda _: lambda self, id, cone: True)),
    "values for keys": ("heads", (Fuser, "_attention_inputs", lambda f: lambda self, n: (f(self, n)[0], *f(self, n)[:0:-1]))),
    "a norm's scale is lost": ("residuals", (_rewrite, "_move", lambda _: without_scale)),
    "both factors of a square lose it": ("residuals", (_rewrite, "_strip", lambda f: lambda t, id: _strip_all(f, t, id))),
    "states end as each other": ("streams", (_build, "DecodeStep", exchanged)),
    "a phase does not say what it reads": ("residuals", (Fuser, "_tensors", lambda f: lambda *a: f(*a)[1:])),
    "reductions out of order": ("elementwise", (Fuser, "_reductions", lambda f: lambda *a: f(*a)[::-1])),
    "a constant vector is its first number": ("elementwise", (_trace := __import__("mkdsl.graph._trace", fromlist=["_"]), "_are_all_the_same", lambda _: lambda v: True)),
}  # fmt: skip
