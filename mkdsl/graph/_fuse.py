"""Values -> fused phases: which folds run together, what their prologues and epilogues absorb, which values cross phases.

A value crosses phases (becomes a `Tensor`) only where it must: at the edge of what a fold's epilogue can compute from its own rows.
Everything else is recomputed by whoever needs it, in a prologue or an epilogue. Where phases do not depend on each other they may come in any
order, and the one that comes last absorbs what joins them. `_orders` has the choices.
"""

import math
from collections.abc import Iterable, Sequence

from mkdsl.graph import _networkx as nx
from mkdsl.graph._phases import AttentionPhase, FoldPhase, MapPhase, Part, Phase, Tensor, tiled
from mkdsl.graph._trace import ROWWISE
from mkdsl.graph._types import Code, DecodeStep, Node, UnsupportedError, depth, head_dims
from mkdsl.ops import LINEAR

EXACT = ("float32", "bfloat16", "float16", "bool")  # what a float32 holds: outputs cross as that
GIVEN = frozenset(("param", "cache", "literal", "token", "pos", "given"))


class Fuser:
    """Walks the DAG once, adding phases in program order."""

    def __init__(self, step: DecodeStep) -> None:
        self.dag, self.repeats, self.outputs, self.node = step.dag, step.repeats, step.outputs, step.node
        self.order: list[int] = list(nx.topological_sort(self.dag))
        self.head_dims = head_dims(map(self.node, self.dag))
        self.tensors: dict[str, Tensor] = {}
        self.tensor_of: dict[int, str] = {}
        self.output_of: dict[int, str] = {}
        self.targets: dict[tuple[int, int], list[str]] = {}  # (node, segment) -> carried tensors it is written to
        self.phases: list[Phase] = []
        self.code: dict[str, Code] = {}
        self.taken: list[tuple[int, int]] = []
        for j, carry in enumerate(step.carries):
            self._declare_carry("x" if len(step.carries) == 1 else f"x{j}", *carry)

    def _declare_carry(self, name: str, carry: int, init: int, final: int) -> None:
        segment = self.node(carry).segment
        self.tensors[name] = Tensor(name=name, width=self._tiled(carry), carried=True)
        for id in (carry, *(u for u in self.dag.successors(carry) if self.node(u).kind == "carried")):
            self.tensor_of[id] = name
        self.targets.setdefault((init, segment - 1), []).append(name)
        self.targets.setdefault((final, segment), []).append(name)

    def _tiled(self, id: int) -> int:
        """The width that a value is laid out with."""
        return tiled(self.node(id).width, self.head_dims)

    def run(self, script: Sequence[int] = ()) -> "Fuser":
        """Fuses everything. Where several phases could come next it takes the one that `script` says, the first after its end; `taken` has
        (which, of how many) for every step."""
        for segment in range(len(self.repeats)):
            waiting = [i for i in self.order if self.node(i).segment == segment and self.node(i).kind in ("fold", "attention")]
            while waiting:
                ready = self._next_phases(waiting)
                which = script[len(self.taken)] if len(self.taken) < len(script) else 0
                self.taken.append((which, len(ready)))
                siblings = ready[which]
                if self.node(siblings[0]).kind == "attention":
                    self._attention(segment, siblings[0])
                else:
                    self._folds(segment, siblings)
                waiting = [i for i in waiting if i not in siblings]
            self._leftovers(segment)
        return self

    def _next_phases(self, waiting: list[int]) -> list[list[int]]:
        """What could be the next phase: each an attention, or folds that stream past the same resident."""
        out: list[list[int]] = []
        for id in filter(self._ready, waiting):
            home = next((siblings for siblings in out if self._siblings(id, siblings[0])), None)
            out.append([id]) if home is None else home.append(id)
        return out

    # What can be computed where.

    def _ready(self, id: int) -> bool:
        return all(self._available(i) for i in self.node(id).inputs)

    def _siblings(self, a: int, b: int) -> bool:
        x, y = self.node(a), self.node(b)
        return x.kind == y.kind == "fold" and x.inputs[1] == y.inputs[1] and x.op == y.op == LINEAR

    def _available(self, id: int) -> bool:
        """Whether a value can be computed from what has crossed phases so far."""
        node = self.node(id)
        if id in self.tensor_of or node.kind in GIVEN:
            return True
        return node.kind not in ("fold", "attention", "carry", "carried") and all(map(self._available, node.inputs))

    def _under(self, roots: Iterable[int], stop: Iterable[int] = ()) -> set[int]:
        """The nodes that computing `roots` visits: down to tensors and to what is given, not below `stop`."""
        seen: set[int] = set()
        stack = [r for r in roots if r not in set(stop)]
        while stack:
            id = stack.pop()
            if id not in seen:
                seen.add(id)
                stack += [] if id in self.tensor_of else [i for i in self.node(id).inputs if i not in set(stop)]
        return seen

    def _tensors(self, roots: Iterable[int], stop: Iterable[int] = ()) -> tuple[str, ...]:
        return tuple(sorted({self.tensor_of[i] for i in self._under(roots, stop) if i in self.tensor_of}))

    def _reductions(self, roots: Iterable[int]) -> tuple[int, ...]:
        """The reductions over whole vectors that computing `roots` needs, in dependency order."""
        under = self._under(roots)
        return tuple(i for i in self.order if i in under and i not in self.tensor_of and self.node(i).kind == "reduce")

    def _cone(self, folds: Iterable[int], segment: int) -> set[int]:
        """Nodes that an epilogue over these folds' rows can compute."""
        cone = set(folds)
        for id in self.order:
            node = self.node(id)
            inside = [i for i in node.inputs if i in cone]
            rowwise = node.segment == segment and node.kind in ROWWISE and len(node.shape) == 1 and node.width > 1
            if inside and rowwise and all(i in cone or self._available(i) for i in node.inputs):
                cone.add(id)
        return cone

    # Phases.

    def _folds(self, segment: int, siblings: list[int]) -> None:
        cone = self._cone(siblings, segment)
        written = {i: t for i in self.order if i in cone and (t := self._written(i, cone, segment, siblings))}
        parts = self._zip(siblings, written, cone)
        first = self.node(siblings[0])
        resident = first.inputs[1]
        inner = self.dag.subgraph(cone)
        computed = {n for id in written for n in nx.ancestors(inner, id) | {id}} - set(siblings)
        epilogue = sorted({i for n in computed for i in self.node(n).inputs} - cone)
        stats = self._reductions([resident, *epilogue])
        phase = FoldPhase(
            name=self._unique("+".join("·".join(map(self._weight, folds)) for folds, _ in parts)), segment=segment,
            k=self._tiled(resident) if first.op == LINEAR else self.node(resident).width, aligned=self._aligned(siblings),
            dtype=self.node(first.inputs[0]).dtype, parallel=first.op == LINEAR, where=first.where,
            separable=self._separable(resident, stats), reductions=len(stats),
            reads=self._tensors([resident, *stats]), row_reads=self._tensors(epilogue, stats),
            parts=tuple(self._part(folds, [t for id in ids for t in written[id]]) for folds, ids in parts),
        )  # fmt: skip
        self._add(phase, Code(resident, stats, tuple((folds, tuple(id for id in ids for _ in written[id])) for folds, ids in parts)))

    def _aligned(self, folds: list[int]) -> int:
        rows = [self.node(self.node(f).inputs[0]).rows for f in folds]
        return math.gcd(8, *(n for r in rows for n in (r.first, r.whole)))

    def _separable(self, resident: int, stats: tuple[int, ...]) -> bool:
        wide = all(self.node(self.node(r).inputs[0]).width == self.node(resident).width for r in stats)
        return wide and all(depth(self.node, self.tensor_of, i) == 0 for i in (resident, *stats))

    def _written(self, id: int, cone: set[int], segment: int, siblings: list[int]) -> list[str]:
        """The tensors that hold this value for those outside the cone; declares them."""
        names = list(self.targets.get((id, segment), ()))
        outside = [self.node(u) for u in self.dag.successors(id) if u not in cone]
        label = "·".join(map(self._weight, (f for f in siblings if f == id or f in nx.ancestors(self.dag, id))))
        if id in self.outputs or any(u.kind == "argmax" for u in outside):
            names.append(self._declare_output(label, id))
        if any(u.kind != "argmax" for u in outside) and not self._available(id):  # else its users compute it from what is there
            self.tensor_of[id] = self._declare(Tensor(name=label, width=self._tiled(id), rounds=self._rounded(id, cone)))
            names.append(self.tensor_of[id])
        return names

    def _rounded(self, id: int, cone: set[int]) -> bool:
        """Whether all who use a value outside its cone do so as the resident of a linear fold, which is bfloat16."""
        users = [self.node(u) for u in self.dag.successors(id) if u not in cone]
        folded = [u.kind == "fold" and u.op == LINEAR and u.inputs[1] == id for u in users]
        reshaped = [u.kind == "reshape" and self._rounded(u.id, cone) for u in users]
        return id not in self.outputs and all(f or r for f, r in zip(folded, reshaped, strict=True))

    def _zip(self, siblings: list[int], written: dict[int, list[str]], cone: set[int]) -> list[tuple[tuple[int, ...], list[int]]]:
        """Splits sibling folds into parts: those whose results meet in a written value are zipped row by row."""
        together = nx.Graph()
        together.add_nodes_from(siblings)
        inner = self.dag.subgraph(cone)
        feeds = {b: [f for f in siblings if f == b or f in nx.ancestors(inner, b)] for b in written}
        for folds in feeds.values():
            nx.add_path(together, folds)
        components = sorted((tuple(sorted(c)) for c in nx.connected_components(together)), key=min)
        return [(folds, [b for b in written if feeds[b][0] in folds]) for folds in components if any(feeds[b][0] in folds for b in written)]

    def _part(self, folds: tuple[int, ...], writes: list[str]) -> Part:
        return Part(weights=tuple(map(self._weight, folds)), rows=self._tiled(folds[0]), writes=tuple(writes))

    def _weight(self, fold: int) -> str:
        weight = self.node(self.node(fold).inputs[0])
        if weight.kind != "param":
            what = f"{weight.dtype}{list(weight.shape)} is computed ({weight.kind})"
            raise UnsupportedError(
                f"{self.node(fold).where}: the streamed array {what}; stream a leaf of params as it is, stored [out, in]"
            )
        return weight.op.path.rsplit(".", 1)[-1]

    def _attention(self, segment: int, id: int) -> None:
        node = self.node(id)
        inputs = self._attention_inputs(node)
        *_, kv_heads, size, head_dim = self.node(node.inputs[1]).shape
        pages = [self.node(table).width for table in node.inputs[4:]]  # of a sequence, where its cache is paged
        reads, width = self._tensors(inputs), self._tiled(id)
        rounds = self._rounded(id, {id})
        name = self._declare(Tensor(name="attention", width=width, heads=width // head_dim, rounds=rounds))
        self.tensor_of[id] = name
        phase = AttentionPhase(
            name=self._unique("attention"), segment=segment, context=size * math.prod(pages), heads=node.width // head_dim, kv_heads=kv_heads,
            head_dim=head_dim, dtype=self.node(node.inputs[1]).dtype, window=node.op.window, page=size if pages else None, where=node.where,
            reads=reads, row_reads=(), parts=(Part(weights=(), rows=width, writes=(name,)),),
        )  # fmt: skip
        self._add(phase, Code(None, (), (((id,), inputs),)))

    def _attention_inputs(self, node: Node) -> tuple[int, ...]:
        """(q, new k, new v): the appended token's keys and values join from registers, not through the cache."""
        appended = [self.node(i) for i in node.inputs[1:3]]
        if any(a.kind != "append" or self.node(a.inputs[0]).kind != "cache" for a in appended):
            raise UnsupportedError(
                f"{node.where}: attention over a cache that this token was not appended to; call kv = mk.append(kv, k, v, pos) first"
            )
        return (node.inputs[0], *(a.inputs[1] for a in appended))

    def _leftovers(self, segment: int) -> None:
        """A map phase for values that no fold's epilogue could write: first and last loop state, computed outputs."""
        written = {t for p in self.phases if p.segment == segment for t in p.writes}
        todo = [(id, t) for (id, s), names in self.targets.items() if s == segment for t in names if t not in written]
        last = segment == len(self.repeats) - 1
        wanted = {o for o in self.outputs if last} | {
            i for a in self.order if last and self.node(a).kind == "argmax" for i in self.node(a).inputs
        }
        for id in sorted(wanted - set(self.output_of)):
            if self.node(id).kind != "param" and self.node(id).dtype in EXACT and len(self.node(id).shape) == 1:
                todo.append((id, self._declare_output("out", id)))
        if todo:
            self._map(segment, todo)

    def _map(self, segment: int, written: list[tuple[int, str]]) -> None:
        """A phase that computes values, row block by row block, and writes them to tensors."""
        ids = [id for id, _ in written]
        stats = self._reductions(ids)
        phase = MapPhase(
            name=self._unique("map"), segment=segment, where=self.node(ids[0]).where, reads=self._tensors(stats),
            row_reads=self._tensors(ids, stats), reductions=len(stats), reduced=tuple(self._tiled(self.node(r).inputs[0]) for r in stats),
            parts=tuple(Part(weights=(), rows=self._tiled(i), writes=(t,)) for i, t in written),
        )  # fmt: skip
        self._add(phase, Code(None, stats, tuple(((), (i,)) for i in ids)))

    # Names.

    def _declare_output(self, label: str, id: int) -> str:
        self.output_of[id] = self._declare(Tensor(name=f"{label}.out", width=self._tiled(id), output=True))
        return self.output_of[id]

    def _declare(self, tensor: Tensor) -> str:
        name = _free(tensor.name, self.tensors)
        self.tensors[name] = Tensor(**{**tensor.__dict__, "name": name})
        return name

    def _unique(self, name: str) -> str:
        return _free(name, self.code)

    def _add(self, phase: Phase, code: Code) -> None:
        self.phases.append(phase)
        self.code[phase.name] = code


def _free(name: str, taken: Iterable[str]) -> str:
    taken = set(taken)
    return name if name not in taken else next(f"{name}.{i}" for i in range(2, len(taken) + 3) if f"{name}.{i}" not in taken)
