"""What a kernel does with the phases of a graph, in numpy: tile by tile, split by split, for one sequence.

Told from the graph alone, without looking at `mkdsl.lower`. A phase computes from the tensors that it says it reads, as they were handed over.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from grammar.arithmetic import COMBINE, REDUCTIONS, Arithmetic, Array
from grammar.pieces import Features, Heads, NotComputable
from grammar.plain import Plain, attended, scored
from mkdsl.graph import AttentionPhase, Code, FoldPhase, Leaf, MapPhase, Node, OpGraph, Phase
from mkdsl.ops import LINEAR, Attention

LEAST = -1e30


@dataclasses.dataclass(frozen=True)
class Cuts:
    """How phases are cut, as a schedule would: a fold's rows, and along k `split_k` pieces in units of `tile_k`; attention's cache in blocks, of
    which every split has every so-many-th. They need not divide anything."""

    rows: int = 64
    split_k: int = 1
    tile_k: int = 64
    block: int = 64
    splits: int = 1


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A decode step's arguments, flattened; params with the graph's own constants at the end."""

    params: Sequence[Array]
    kv: Sequence[Array]
    token: int
    pos: int


class Queries(NamedTuple):
    """Those of one kv head [queries, head_dim]; the token's own key and value [head_dim]; the cache [context, head_dim]."""

    op: Attention
    q: Array
    key: Array
    value: Array
    keys: Array
    values: Array


class Run:
    """One decode step. narrow: what all readers round crosses as bfloat16."""

    def __init__(self, graph: OpGraph, inputs: Inputs, arithmetic: Arithmetic, cuts: Cuts, *, narrow: bool = True) -> None:
        self.graph, self.inputs, self.arithmetic, self.cuts, self.narrow = graph, inputs, arithmetic, cuts, narrow
        self.kv = [leaf.copy() for leaf in inputs.kv]
        self.now: dict[str, Array] = {}  # what tensors hold
        self.before: dict[str, Array] = {}  # and what they held when the iteration began
        self.written: set[str] = set()  # in this iteration, or before the segment
        self.home = {t: max(p.segment for p in graph.phases if t in p.writes) for t in graph.tensors}
        self.numbers: dict[int, Array] = {}
        self.phase: Phase
        self.iteration = 0

    def outputs(self) -> list[Array]:
        """Runs all phases; returns what the caller gets, flattened."""
        for number, segment in enumerate(self.graph.segments):
            for self.iteration in range(segment.repeats):
                self.before = dict(self.now)
                self.written -= {t for t, home in self.home.items() if home == number}
                for name in segment.phases:
                    self._execute(self.graph.phase(name))
        return [self._output(self.graph.node(id)) for id in self.graph.outputs]

    def _execute(self, phase: Phase) -> None:
        self.phase = phase
        code = self.graph.code[phase.name]
        match phase:
            case FoldPhase():
                self._fold(phase, code)
            case AttentionPhase():
                self._attention(phase, code)
            case MapPhase():
                stats = self._stats(phase, code)
                for (_, ids), part in zip(code.parts, phase.parts, strict=True):
                    self._finish(phase, ids, part.writes, stats, {})

    # Tensors.

    def read(self, name: str) -> Array:
        """A tensor as it was handed over; attention's splits are merged by whoever reads them."""
        carried = self.graph.tensors[name].carried and self.home[name] == self.phase.segment
        if not carried and name not in self.written:
            raise NotComputable(f"{self.phase.name} reads {name} before it is written")
        held = (self.before if carried else self.now)[name]
        return _merged(*held) if isinstance(held, tuple) else held

    def write(self, name: str, value: Array) -> None:
        tensor = self.graph.tensors[name]
        value = self.arithmetic.hold(value, "float32")
        self.now[name] = self.arithmetic.narrow(value) if tensor.rounds and self.narrow else value
        self.written.add(name)

    # What is known before a kernel starts.

    def leaf(self, node: Node) -> Array:
        """A parameter; of a stacked one this iteration's."""
        leaf: Leaf = node.op
        array = self.inputs.params[leaf.index]
        array = array[self.iteration] if leaf.stacked else array
        return array if leaf.rows is None else array[leaf.rows.first :][: leaf.rows.count]

    def constant(self, node: Node) -> Array:
        return self.arithmetic.hold(np.asarray(node.op).reshape(()), node.dtype)

    def given(self, id: int) -> Array:
        if id not in self.numbers:
            self.numbers[id] = self._given(self.graph.node(id))
        return self.numbers[id]

    def _given(self, node: Node) -> Array:
        """A number, or one of the whole vectors that it comes from."""
        if node.kind in ("token", "pos"):
            return np.asarray(getattr(self.inputs, node.kind), np.int32)
        if node.kind == "literal":
            return np.broadcast_to(self.arithmetic.hold(np.asarray(node.op), node.dtype), node.shape)
        if isinstance(node.op, Leaf) and not node.op.stacked:
            return self.leaf(node).reshape(node.shape)
        if node.kind not in ("given", "map", "reduce", "reshape", "broadcast"):
            raise NotComputable(f"{node.where}: {node.kind}{list(node.shape)} is not known before the kernel starts")
        inputs = [self.given(i) for i in node.inputs]
        if node.op is None:
            return inputs[0].reshape(node.shape) if inputs[0].size == node.width else np.broadcast_to(inputs[0], node.shape)
        if isinstance(node.op, str):
            return REDUCTIONS[node.op](inputs[0], -1)
        primitive, params, *which = node.op
        return Plain(self.arithmetic).primitive(primitive.name, params, inputs, node)[which[0] if which else 0]

    # Folds and maps.

    def _stats(self, phase: Phase, code: Code) -> dict[int, Array]:
        """The reductions of a prologue, each over pieces of its vector."""
        stats: dict[int, Array] = {}
        for id in code.stats:
            node = self.graph.node(id)
            source = self.graph.node(node.inputs[0])
            if len(source.shape) != 1:
                raise NotComputable(f"{node.where}: a reduction of {list(source.shape)} in {phase.name}")
            for first, last in _cut(source.width, self.cuts.split_k):
                piece = Features(self, phase.reads, dict(stats), first=first, last=last)
                value = REDUCTIONS[node.op](np.broadcast_to(piece.value(source.id), last - first))
                stats[id] = COMBINE[node.op](stats[id], value) if first else value
        return stats

    def _fold(self, phase: FoldPhase, code: Code) -> None:
        stats = self._stats(phase, code)
        assert code.resident is not None
        pieces = []
        for first, last in _cut(self.graph.node(code.resident).width, self.cuts.split_k):
            piece = Features(self, phase.reads, dict(stats), first=first, last=last).value(code.resident)
            pieces.append(self.arithmetic.narrow(np.broadcast_to(piece, last - first)))
        resident = np.concatenate(pieces)
        for (folds, ids), part in zip(code.parts, phase.parts, strict=True):
            sums = {fold: self._sums(self.graph.node(fold), resident) for fold in folds}
            self._finish(phase, ids, part.writes, stats, sums)

    def _sums(self, fold: Node, resident: Array) -> Array:
        """A fold's rows: those of each piece of k unit by unit, and then the pieces' sum. A user's fold goes through all units in a row."""
        weight = self.leaf(self.graph.node(fold.inputs[0]))
        units = [
            [slice(a, min(a + self.cuts.tile_k, last)) for a in range(first, last, self.cuts.tile_k)]
            for first, last in _cut(len(resident), self.cuts.split_k)
        ]
        if fold.op != LINEAR:
            return Plain(self.arithmetic).fold(fold.op, [(weight[:, u], resident[u]) for piece in units for u in piece])
        return sum(sum(weight[:, u] @ resident[u] for u in piece) for piece in units)

    def _finish(self, phase: Phase, ids: Sequence[int], writes: Sequence[str], stats: dict[int, Array], sums: dict) -> None:
        """An epilogue, or what a map computes: some rows at a time. What fills the last tile is left out: nobody may look at it."""
        rows = self.graph.node(ids[0]).width
        written = {name: np.empty(rows, self.arithmetic.floating) for name in writes}
        own = frozenset(i for _, computed in self.graph.code[phase.name].parts for i in computed if self.graph.node(i).kind != "carry")
        own -= {i for i in own if self.graph.tensor_of.get(i, phase.writes[0]) not in phase.writes}  # handed on from another tensor
        for first in range(0, rows, self.cuts.rows):
            last = min(first + self.cuts.rows, rows)
            known = stats | {fold: total[first:last] for fold, total in sums.items()}
            piece = Features(self, (*phase.reads, *phase.row_reads), known, own, first=first, last=last)
            for id, name in zip(ids, writes, strict=True):
                written[name][first:last] = piece.value(id)
        for name, value in written.items():
            self.write(name, value)

    # Attention.

    def _attention(self, phase: AttentionPhase, code: Code) -> None:
        (((id,), (q, k, v)),) = code.parts
        node = self.graph.node(id)
        attended_at = int(self.given(node.inputs[3]))
        keys, values = (self.graph.node(i) for i in node.inputs[1:3])
        appended_at = int(self.given(keys.inputs[2]))
        splits = self.cuts.splits if self._may_split(phase.writes[0]) else 1
        out: list[tuple[Array, Array]] = []
        for head in range(phase.kv_heads):
            new = [self._heads(phase, i, head, head + 1)[0] for i in (k, v)]
            caches = [self._cache(a)[head] for a in (keys, values)]
            queries = self._heads(phase, q, head * phase.queries, (head + 1) * phase.queries)
            out.append(self._past_cache(Queries(node.op, queries, *new, *caches), splits, appended_at, attended_at))
            for cache, row in zip(caches, new, strict=True):
                if 0 <= appended_at < phase.context:
                    cache[appended_at] = row
        results, sizes = (np.concatenate(a, 1) for a in zip(*out, strict=True))  # [splits, heads, head_dim], [splits, heads]
        if splits == 1:
            self.write(phase.writes[0], results[0].reshape(-1))
        else:
            self.now[phase.writes[0]] = (results, sizes)
            self.written.add(phase.writes[0])

    def _may_split(self, name: str) -> bool:
        """Only a fold's prologue merges splits."""
        readers = [p for p in self.graph.phases if name in (*p.reads, *p.row_reads)]
        return all(isinstance(p, FoldPhase) and name not in p.row_reads for p in readers)

    def _heads(self, phase: AttentionPhase, id: int, first: int, last: int) -> Array:
        piece = Heads(self, phase.reads, {}, head_dim=phase.head_dim, first=first, last=last)
        if any(self.graph.tensors[t].heads for t in phase.reads):
            raise NotComputable(f"{phase.where}: attention reads another attention's result")
        return self.arithmetic.narrow(np.asarray(piece.whole(id)))

    def _cache(self, append: Node) -> Array:
        """[kv_heads, context, head_dim], to be written to."""
        leaf: Leaf = self.graph.node(append.inputs[0]).op
        return self.kv[leaf.index][self.iteration] if leaf.stacked else self.kv[leaf.index]

    def _past_cache(self, queries: "Queries", splits: int, appended_at: int, attended_at: int) -> tuple[Array, Array]:
        """One kv head's queries past its cache: ([splits, queries, head_dim] normalised, [splits, queries] logarithms of what they weigh).

        The token's own key and value are the first carry of split 0; where they are appended the cache is not looked at.
        """
        context, shape = len(queries.keys), queries.q.shape
        if not 0 <= attended_at < context:
            return np.full((splits, *shape), np.nan), np.full((splits, shape[0]), np.nan)
        keep = attended(queries.op, context, attended_at)
        itself = 0 <= appended_at < context and keep[appended_at]
        if itself:
            keep[appended_at] = False
        found = [self._split(queries, keep, itself and split == 0, split, splits) for split in range(splits)]
        results, sizes = zip(*found, strict=True)
        return np.stack(results), np.stack(sizes)

    def _split(self, queries: "Queries", keep: Array, itself: bool, split: int, splits: int) -> tuple[Array, Array]:
        """Block after block with a running maximum m, the sum z of what is weighed by it, and the weighted sum of values."""
        op, q, floating = queries.op, queries.q, self.arithmetic.floating
        m = scored(op, q @ queries.key) if itself else np.full(len(q), LEAST, floating)
        z = np.full(len(q), float(itself), floating)
        acc = z[:, None] * queries.value
        for first in range(split * self.cuts.block, len(keep), splits * self.cuts.block):
            block = slice(first, first + self.cuts.block)
            s = np.where(keep[block], scored(op, q @ queries.keys[block].T), floating(LEAST))
            top = np.maximum(m, s.max(1))
            p = np.where(keep[block], np.exp(s - top[:, None]), 0.0)
            old = np.exp(m - top)
            z, acc = z * old + p.sum(1), acc * old[:, None] + self.arithmetic.narrow(p) @ queries.values[block]
            m = top
        z = np.maximum(z, 1e-30)
        return acc / z[:, None], m + np.log(z)

    # Results.

    def _output(self, node: Node) -> Array:
        if node.id in self.graph.output_of:
            return self.arithmetic.hold(self.now[self.graph.output_of[node.id]], node.dtype)
        match node.kind:
            case "argmax":
                return np.asarray(np.argmax(self._output(self.graph.node(node.inputs[0]))), np.int32)
            case "append":
                return self.kv[self.graph.node(node.inputs[0]).op.index]
            case "cache":
                return self.inputs.kv[node.op.index]
            case "literal":
                return np.broadcast_to(self.arithmetic.hold(np.asarray(node.op), node.dtype), node.shape)
            case "map":
                inputs = [self._output(self.graph.node(i)) for i in node.inputs]
                return self.arithmetic.apply(node.op[0].name, node.op[1], inputs, node.dtype)
        return self.given(node.id)


def _cut(n: int, pieces: int) -> list[tuple[int, int]]:
    """[0, n) in that many pieces of about the same size; in fewer if there is nothing for them."""
    size = -(-n // pieces)
    return [(a, min(a + size, n)) for a in range(0, n, size)]


def _merged(results: Array, sizes: Array) -> Array:
    """Attention's splits as one vector: each weighs as much as the scores it has seen."""
    weights = np.exp(sizes - sizes.max(0))
    return ((weights / weights.sum(0))[..., None] * results).sum(0).reshape(-1)
