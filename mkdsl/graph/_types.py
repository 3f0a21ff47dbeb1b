"""`OpGraph`: the operator DAG that leaves this stage, as plain frozen data."""

import dataclasses
import functools
from collections.abc import Callable, Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mkdsl.graph._phases import AttentionPhase, Phase, Segment, Tensor, tiled

if TYPE_CHECKING:
    import networkx as nx


class UnsupportedError(TypeError):
    """Something in the decode step has no tile lowering. The message names it, the user's line, and what to write instead."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows [first, first + count) of an array that has `whole` of them, in each layer."""

    first: int
    count: int
    whole: int

    def __str__(self) -> str:
        return f"[{self.first}:{self.first + self.count}]"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A weight or cache array where the caller keeps it: leaf `index` of the flattened params (or kv); `stacked` over layers or not. rows: those
    that are meant, along the first axis behind that of layers; None: all."""

    path: str
    index: int
    stacked: bool
    rows: Rows | None = None

    def of(self, leaves: Sequence[Any]) -> Any:
        """What is meant of the flattened arrays, all layers of it."""
        array = leaves[self.index]
        if self.rows is None:
            return array
        meant = slice(self.rows.first, self.rows.first + self.rows.count)
        return array[:, meant] if self.stacked else array[meant]

    @property
    def parameter(self) -> str:
        """The operand of a kernel that holds it, where it is no streamed weight."""
        return f"param{self.index}{self.rows or ''}"


@dataclasses.dataclass(frozen=True)
class Node:
    """One value of the decode step, for one token.

    `kind` is param, cache, token, pos, literal, given (a number known before the kernel starts), carry (a loop's state), map (elementwise),
    reduce (over the last axis), reshape, or an operator's name: fold, attention, append, rope, embed, argmax. `op` holds what the kind
    needs: a Leaf, an Operator, or (primitive, its params). `inputs` are node ids. `where` is the user's file and line.
    """

    id: int
    kind: str
    shape: tuple[int, ...]
    dtype: str
    inputs: tuple[int, ...] = ()
    op: Any = None
    where: str = ""
    segment: int = 0

    @property
    def width(self) -> int:
        """Features per token, heads flattened."""
        n = 1
        for d in self.shape:
            n *= d
        return n

    @property
    def rows(self) -> Rows:
        """Of a weight: those that are meant."""
        return self.op.rows or Rows(0, self.shape[0], self.shape[0])

    @property
    def is_scalar(self) -> bool:
        """One number per token."""
        return self.width == 1


@dataclasses.dataclass(frozen=True)
class Code:
    """How a phase computes: node ids. `stats` are the reductions its prologue needs, in order; `resident` is what it stages;
    `parts` pairs the folds of each part with the nodes that its epilogue writes."""

    resident: int | None
    stats: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class DecodeStep:
    """A decode step as values, before it is fused.

    `dag` holds every value (node attribute "node"), `repeats` how often each segment runs, `carries` (loop state, its first value, its value
    after an iteration), `outputs` what the caller gets, `constants` are parameters of its own, `where` it is written.
    """

    dag: "nx.DiGraph"
    repeats: tuple[int, ...]
    carries: tuple[tuple[int, int, int], ...]
    outputs: tuple[int, ...]
    context: int
    constants: tuple[Any, ...]
    where: str

    def node(self, id: int) -> Node:
        return self.dag.nodes[id]["node"]


def depth(node: Callable[[int], Node], held: Container[int], id: int) -> int:
    """How many reductions, one after the other, must be complete before a value can be computed from those that are `held`."""
    if id in held:
        return 0
    return max((depth(node, held, i) + (node(i).kind == "reduce") for i in node(id).inputs), default=0)


def head_dims(nodes: Iterable[Node]) -> frozenset[int]:
    """The widths of attention's heads, of which vectors of several heads are whole numbers."""
    return frozenset(node.shape[-1] for node in nodes if node.kind == "append")


@dataclasses.dataclass(frozen=True, eq=False)
class OpGraph:
    """A decode step as fused phases.

    `dag` holds every value (node attribute "node"); `phases` are in program order; `code` says by node id what each computes;
    `tensor_of` maps a node to the tensor that holds it for later phases, `output_of` to the one handed to the caller. `others`: the same step
    with its phases in other orders.
    """

    dag: "nx.DiGraph"
    phases: tuple[Phase, ...]
    segments: tuple[Segment, ...]
    tensors: dict[str, Tensor]
    code: dict[str, Code]
    tensor_of: dict[int, str]
    output_of: dict[int, str]
    outputs: tuple[int, ...]
    context: int
    constants: tuple[Any, ...] = ()
    where: str = ""
    others: tuple["OpGraph", ...] = ()

    def in_order(self, phases: Sequence[str]) -> "OpGraph":
        """The graph whose phases come in this order; itself if there is none such."""
        return next((g for g in (self, *self.others) if tuple(g.order) == tuple(phases)), self)

    def node(self, id: int) -> Node:
        return self.dag.nodes[id]["node"]

    def tiled(self, width: int) -> int:
        """The width that a vector of so many features is laid out with."""
        return tiled(width, self._head_dims)

    @functools.cached_property
    def _head_dims(self) -> frozenset[int]:
        return head_dims(map(self.node, self.dag))

    def stored(self, id: int) -> str | None:
        """The tensor that is a value as it stands, but for its shape; None if it must be computed."""
        while id not in self.tensor_of and self.node(id).kind == "reshape":
            id = self.node(id).inputs[0]
        return self.tensor_of.get(id)

    def computes(self, phase: Phase, id: int) -> bool:
        """Whether a phase computes a value that it writes. Else it only hands the value on from the tensor that holds it, as the loop's state when
        the iteration began, also if what the state becomes is written by the same phase."""
        return self.node(id).kind != "carry" and self.tensor_of.get(id) in (None, *phase.writes)

    def phase(self, name: str) -> Phase:
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, Phase]:
        return {p.name: p for p in self.phases}

    @functools.cached_property
    def order(self) -> dict[str, int]:
        """Each phase's place in the program."""
        return {name: i for i, name in enumerate(n for s in self.segments for n in s.phases)}

    @functools.cached_property
    def writers(self) -> dict[str, tuple[Phase, ...]]:
        """By tensor: the phases that write it."""
        return self._users(lambda p: p.writes)

    @functools.cached_property
    def readers(self) -> dict[str, tuple[Phase, ...]]:
        """By tensor: the phases that read it, whole or by rows."""
        return self._users(lambda p: (*p.reads, *p.row_reads))

    def _users(self, tensors: Callable[[Phase], tuple[str, ...]]) -> dict[str, tuple[Phase, ...]]:
        users: dict[str, dict[str, Phase]] = {name: {} for name in self.tensors}
        for phase in self.phases:
            for name in tensors(phase):
                users.setdefault(name, {})[phase.name] = phase
        return {name: tuple(found.values()) for name, found in users.items()}

    @functools.cached_property
    def position_limit(self) -> int:
        """Positions that the step may be called with, since one of its attentions is NaN past its cache; 0 if it does not say."""
        return min(self._contexts, default=0)

    @functools.cached_property
    def table_length(self) -> int:
        """Positions that a table of rotations by `pos` has, past which all attention is NaN; 0 if some is not, as with a cache that is a ring."""
        attentions = [p for p in self.phases if isinstance(p, AttentionPhase)]
        return max(self._contexts, default=0) if len(self._contexts) == len(attentions) else 0

    @functools.cached_property
    def _contexts(self) -> list[int]:
        """Of the attentions up to `pos` itself."""
        attentions = [p for p in self.phases if isinstance(p, AttentionPhase)]
        return [p.context for p in attentions if self.node(self.node(self.code[p.name].parts[0][0][0]).inputs[3]).kind == "pos"]

    @functools.cached_property
    def vocabulary(self) -> int:
        """Tokens that the step may be called with: the rows of the tables in which it looks up the token itself; 0 if there are none."""
        tables = [n.inputs for n in map(self.node, self.dag) if n.kind == "embed" and self.node(n.inputs[1]).kind == "token"]
        return min((self.node(table).shape[0] for table, _ in tables), default=0)

    def has_table(self, rope: Node) -> bool:
        """Whether a rotation is by `pos` itself, of which there are few."""
        return self.node(rope.inputs[1]).kind == "pos" and self.table_length > 0

    def iterations(self, phase: Phase) -> int:
        return self.segments[phase.segment].repeats

    def to_json(self) -> dict[str, Any]:
        """What identifies the graph to the search, as plain data."""
        return {
            "phases": [{"kind": p.kind} | dataclasses.asdict(p) | {"where": ""} for p in self.phases],
            "segments": [dataclasses.asdict(s) for s in self.segments],
            "tensors": [dataclasses.asdict(t) for t in self.tensors.values()],
            "context": self.context,
            "others": [g.to_json() for g in self.others],
        }

    def __repr__(self) -> str:
        return (
            f"<OpGraph of {len(self.phases)} phases in {len(self.segments)} segments, {len(self.tensors)} tensors, context {self.context}>"
        )

    def __str__(self) -> str:
        lines = []
        for segment in self.segments:
            lines.append(f"{segment.repeats} x")
            for phase in map(self.phase, segment.phases):
                parts = " | ".join(f"{'·'.join(p.weights) or phase.kind} [{p.rows}] -> {', '.join(p.writes)}" for p in phase.parts)
                lines.append(f"  {phase.name}: {phase.kind}{phase.streams} reads {', '.join(phase.reads) or '-'}: {parts}")
        return "\n".join(lines)
