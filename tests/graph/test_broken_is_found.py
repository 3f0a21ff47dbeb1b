"""What the grammar is worth: fusion that is broken, and phases that are computed wrongly, are found by some program of the kind that they concern."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from grammar import phases, pieces
from grammar.law import law
from grammar.phases import Run
from grammar.pieces import Features, Heads
from hypothesis import Phase

from mkdsl.graph import _build, _rewrite, _trace
from mkdsl.graph._fuse import Fuser

pytestmark = pytest.mark.medium

PROGRAMS = 60
Broken = tuple[str, Any, str, Callable[[Any], Any]]  # kind of decoders, where, what, and how it is once broken, made from how it was


def _unscaled(tracer: Any, fold: Any, resident: int, scalar: int) -> None:
    _rewrite._replace_input(tracer, fold.id, fold.inputs[1], resident)


def _exchanged(step: Any) -> Any:
    def made(dag: Any, repeats: Any, carries: Any, *rest: Any) -> Any:
        ends = [end for *_, end in carries][::-1]
        return step(dag, repeats, tuple((c, i, end) for (c, i, _), end in zip(carries, ends, strict=True)), *rest)

    return made


def _of_now(read: Any) -> Any:
    def value(run: Run, name: str) -> Any:
        run.before = run.now
        return read(run, name)

    return value


def _of_the_first_layer(leaf: Any) -> Any:
    def array(run: Run, node: Any) -> Any:
        iteration, run.iteration = run.iteration, 0
        found = leaf(run, node)
        run.iteration = iteration
        return found

    return array


GRAPHS: dict[str, Broken] = {
    "all tensors cross as bfloat16": ("residuals", Fuser, "_rounded", lambda _: lambda self, id, cone: True),
    "keys and values exchanged": ("heads", Fuser, "_attention_inputs", lambda f: lambda self, n: (f(self, n)[0], *f(self, n)[:0:-1])),
    "a norm's scale is lost": ("residuals", _rewrite, "_move", lambda _: _unscaled),
    "loop states end as each other": ("streams", _build, "DecodeStep", _exchanged),
    "a phase does not say all it reads": ("residuals", Fuser, "_tensors", lambda f: lambda *a: f(*a)[1:]),
    "reductions out of order": ("residuals", Fuser, "_reductions", lambda f: lambda *a: f(*a)[::-1]),
    "a constant vector is its first number": ("elementwise", _trace, "_are_all_the_same", lambda _: lambda value: True),
    "folds of other activations are siblings": ("residuals", Fuser, "_siblings", lambda _: lambda self, a, b: True),
}  # fmt: skip
PHASES: dict[str, Broken] = {
    "other heads": ("heads", Heads, "cut", lambda f: lambda self, v: f(self, np.roll(v, self.head_dim))),
    "a rotation by the next position": ("positions", pieces, "rotated", lambda f: lambda op, x, pos: f(op, x, pos + 1)),
    "the next position is attended too": ("positions", phases, "attended", lambda f: lambda op, n, pos: f(op, n, pos + 1)),
    "no soft-cap": ("heads", phases, "scored", lambda _: lambda op, s: s * op.scale),
    "loop states are read as they become": ("streams", Run, "read", _of_now),
    "splits weigh the same": ("heads", phases, "_merged", lambda _: lambda results, sizes: results.mean(0).reshape(-1)),
    "all layers' weights are the first's": ("residuals", Run, "leaf", _of_the_first_layer),
    "the end of K is not folded": ("residuals", Run, "_sums", lambda f: lambda self, w, x: f(self, w, np.where(np.arange(x.size) < x.size - 16, x, 0))),
    "another row of a table": ("elementwise", Features, "_row", lambda f: lambda self, node: np.roll(f(self, node), 1)),
    "the position is the next": ("scalars", Run, "_given", lambda f: lambda self, node: f(self, node) + (node.kind == "pos")),
    "reductions of one piece": ("residuals", phases, "COMBINE", lambda f: dict.fromkeys(f, lambda a, b: b)),
    "a user's fold starts anew": ("folds of one's own", phases.Plain, "fold", lambda f: lambda self, op, units: f(self, op, units[-1:])),
}  # fmt: skip


@pytest.mark.parametrize("what", [*GRAPHS, *PHASES])
def test_what_is_broken_is_found(what, monkeypatch):
    kind, where, name, broken = (GRAPHS | PHASES)[what]
    monkeypatch.setattr(where, name, broken(getattr(where, name)))
    holds, _ = law(kind, PROGRAMS, phases=(Phase.generate,))
    with pytest.raises((AssertionError, ArithmeticError, LookupError, ValueError)):
        holds()
