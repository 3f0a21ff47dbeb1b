"""One decoder, evaluated three ways: its plain meaning, the phases of its graph, and the interpreted kernel."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grammar.arithmetic import Arithmetic, Array
from grammar.decoders import Decoder
from grammar.expressions import jumps
from grammar.phases import Cuts, Inputs, Run
from grammar.plain import Plain
from grammar.spec import Spec
from mkdsl.graph import OpGraph, UnsupportedError, build_graph

REAL, ROUNDED, CHOPPED = Arithmetic(real=True), Arithmetic(real=False), Arithmetic(real=False, chops=True)
EXACT = 3e-5  # relative, in real numbers: composed primitives are that close
BFLOAT16 = 2.0**-8
SCALAR = jax.ShapeDtypeStruct((), np.int32)
HERE = str(Path(__file__).parent)


def structs(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), tree)


def graph_of(d: Decoder) -> OpGraph | None:
    """The graph; None of a step that is refused, with a line of this package."""
    try:
        return build_graph(d.step, structs(d.params), structs(d.kv), SCALAR, SCALAR)[0]
    except UnsupportedError as error:
        assert re.match(rf"{re.escape(HERE)}/\w+\.py:\d+:\d+ ", str(error)), error
        return None


@dataclasses.dataclass(frozen=True)
class Ways:
    """The outputs of a decode step, flattened: what it means, and what its phases make of it."""

    decoder: Decoder
    token: int
    pos: int

    def arguments(self, arithmetic: Arithmetic) -> tuple[list[Array], list[Array]]:
        """(params, kv), flattened."""
        held = jax.tree.map(lambda a: arithmetic.hold(a, str(a.dtype)), (self.decoder.params, self.decoder.kv))
        return jax.tree.leaves(held[0]), jax.tree.leaves(held[1])

    def plain(self, arithmetic: Arithmetic) -> list[Array]:
        params, kv = self.arguments(arithmetic)
        closed = jax.make_jaxpr(self.decoder.step)(structs(self.decoder.params), structs(self.decoder.kv), SCALAR, SCALAR)
        with np.errstate(all="ignore"):
            return Plain(arithmetic).closed(closed, [*params, *kv, np.int32(self.token), np.int32(self.pos)])

    def phases(self, graph: OpGraph, arithmetic: Arithmetic, cuts: Cuts, *, narrow: bool = True) -> list[Array]:
        params, kv = self.arguments(arithmetic)
        params += [arithmetic.hold(c, str(c.dtype)) for c in graph.constants]
        with np.errstate(all="ignore"):
            return Run(graph, Inputs(params, kv, self.token, self.pos), arithmetic, cuts, narrow=narrow).outputs()


def difference(got: Array, want: Array) -> float:
    """Relative, of what is not NaN; infinite if they are not NaN alike."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape or (np.isnan(got) != np.isnan(want)).any():
        return np.inf
    there = np.isfinite(want)
    if (got[~there] != want[~there])[~np.isnan(want[~there])].any():
        return np.inf
    return float(_norm((got - want)[there]) / (_norm(want[there]) + 1e-6))


def _norm(x: Array) -> Array:
    return np.sqrt(np.sum(x * x))  # np.linalg.norm starts threads


def check(d: Decoder, spec: Spec, graph: OpGraph, cuts: Cuts, token: int, positions: Sequence[int]) -> None:
    """Phases compute what is meant: in real numbers exactly, whatever their order; and as a kernel rounds them within what bfloat16 explains."""
    for pos in positions:
        ways = Ways(d, token, pos)
        want = ways.plain(REAL)
        for order in (graph, *graph.others[:1]):
            for n, (a, b) in enumerate(zip(ways.phases(order, REAL, cuts), want, strict=True)):
                assert difference(a, b) < EXACT, f"output {n} at {pos=} with {cuts}: off by {difference(a, b)}"
    _check_rounded(ways, graph, cuts, want, jumps=any(map(jumps, dataclasses.astuple(spec))))


def _check_rounded(ways: Ways, graph: OpGraph, cuts: Cuts, want: Sequence[Array], *, jumps: bool) -> None:
    got = ways.phases(graph, ROUNDED, cuts)
    if any(t.rounds for t in graph.tensors.values()):
        for a, b in zip(got, ways.phases(graph, ROUNDED, cuts, narrow=False), strict=True):
            np.testing.assert_array_equal(a, b, "what crosses as bfloat16 is not what all its readers round")
    off = {n: difference(a, b) for n, (a, b) in enumerate(zip(got, want, strict=True)) if a.dtype.kind == "f"}
    for arithmetic in () if jumps else (ROUNDED, CHOPPED):
        explained = [difference(a, b) for a, b in zip(ways.plain(arithmetic), want, strict=True)]
        off = {n: o for n, o in off.items() if o > 2 * BFLOAT16 + 2 * explained[n]}
        if not off:
            return
    assert jumps, f"at pos={ways.pos} outputs are off by {off}, of which rounding explains {explained}"
