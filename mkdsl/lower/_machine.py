"""What the roles of a kernel share: references by name, positions in the ring, hand-offs, and loads that interpret mode understands."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.graph import Leaf, OpGraph, Phase
from mkdsl.lower._types import Carry, Index, Layout, Ref
from mkdsl.lower._waits import Wait, Wanted, mask, number
from mkdsl.lower.mosaic import _ptx
from mkdsl.lower.mosaic._deadline import WORDS, Watch
from mkdsl.schedule import FoldPlan, Schedule, clears, read_instance, written_instance

f32, bf16, i32 = jnp.float32, jnp.bfloat16, jnp.int32
COMPUTE, LOADER = 0, 1  # roles, by their warpgroup


class Request(NamedTuple):
    """An array in global or shared memory: `ref.reshape(lead axes, *view).at[*lead, *index]`, or without the reshape if view is None."""

    ref: Ref
    lead: tuple[Any, ...]
    view: tuple[int, ...] | None
    index: tuple[Any, ...]
    layout: Layout
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(int(d.size) for d in self.index if isinstance(d, pl.Slice))
        return shape[::-1] if self.transposed else shape

    def target(self) -> Any:
        ref = self.ref if self.view is None else self.ref.reshape(*self.ref.shape[: len(self.lead)], *self.view)
        ref = ref.at[(*self.lead, *self.index)]
        return ref.transpose((1, 0)) if self.transposed else ref

    def value(self) -> jax.Array:
        """What it holds, read in a way that interpret mode understands (it knows no reshape of references)."""
        whole = self.ref[self.lead] if self.lead else self.ref[...]
        if self.view is not None:
            whole = whole.reshape(self.view)
        taken = _take(whole, self.index)
        return taken.T if self.transposed else taken

    def run(self) -> tuple[Index, int]:
        """(first, count) of the numbers of a view of the last axis that lie there without a gap. Interpret mode writes these and no others:
        what lies around them may be another worker's."""
        assert self.view is not None and not self.transposed
        first, count = 0, 1
        for size, d in zip(self.view, self.index, strict=True):
            start, taken = (d.start, int(d.size)) if isinstance(d, pl.Slice) else (d, 1)
            assert count == 1 or taken == size, f"{self.index} of {self.view} is in several places"
            first, count = first * size + start, count * taken
        return first, count


def _take(whole: jax.Array, index: Sequence[Any]) -> jax.Array:
    starts = [d.start if isinstance(d, pl.Slice) else d for d in index]
    sizes = [d.size if isinstance(d, pl.Slice) else 1 for d in index]
    kept = tuple(d.size for d in index if isinstance(d, pl.Slice))
    return lax.dynamic_slice(whole, starts, sizes).reshape(kept)


@dataclasses.dataclass
class Machine:
    """One kernel being emitted. `concurrent`: phases run in one launch and hand over through counters; else each launch is one phase.
    `tma`: TMA fills the ring, else the loader's threads do. `deadline`: seconds from the kernel's start after which no hand-off is waited for, or
    None. `role`: the warpgroup whose code this is."""

    graph: OpGraph
    schedule: Schedule
    interpret: bool
    concurrent: bool
    tma: bool
    deadline: float | None = None
    refs: dict[str, Any] = dataclasses.field(default_factory=dict)
    role: int = COMPUTE
    settled: set[tuple[str, int]] = dataclasses.field(default_factory=set)  # (phase, reduction): summed over parts already

    # Static facts.

    @property
    def batch(self) -> int:
        return self.schedule.padded_batch

    def column(self, phase: Phase, part: int) -> int:
        """Where a part's (first, count) stand in a worker's row of the task table."""
        at = 0
        for p in self.graph.phases:
            if p.name == phase.name:
                return at + 2 * part
            at += 2 * len(p.parts)
        raise KeyError(phase.name)

    @property
    def worker(self) -> Any:
        return lax.axis_index("sm") * self.schedule.cluster + self.rank

    @property
    def rank(self) -> Any:
        """This worker's place in its cluster."""
        return lax.axis_index("cta") if self.schedule.cluster > 1 else 0

    def peers(self, phase: Phase) -> Sequence[Index]:
        """Whose items of a phase this worker folds: of all in its cluster that share them, or its own, None."""
        cluster = self.schedule.plan(phase.name).cluster
        return range(cluster) if cluster > 1 else (None,)

    def tasks(self, phase: Phase, part: int, peer: Index = None) -> tuple[jax.Array, jax.Array]:
        """(first item, count) of this worker, or of another of its cluster."""
        table, at, who = self.refs["tasks"], self.column(phase, part), self.rank if peer is None else peer
        return table[self.role, who, at], table[self.role, who, at + 1]

    def by_wgmma(self, plan: FoldPlan) -> bool:
        """Whether a fold's tensor cores read both operands from shared memory, where TMA has written. Interpret mode multiplies in one way."""
        return plan.instruction == "wgmma" and self.tma and not self.interpret

    def given(self, id: int) -> Ref:
        """The numbers of a node that is known before the kernel starts, [batch]."""
        node = self.graph.node(id)
        return self.refs[node.kind if node.kind in ("token", "pos") else f"given{id}"]

    def address(self, id: int, sequence: Index) -> Index:
        """An int32 that is known before the kernel starts, for one sequence."""
        node = self.graph.node(id)
        return i32(node.op) if node.kind == "literal" else self.given(id)[sequence]

    def layer(self, leaf: Leaf, iteration: Index) -> Any:
        return iteration if leaf.stacked else 0

    def incarnation(self, tensor: str, instance: Index) -> Any:
        n = self.schedule.tensor(tensor).incarnations
        return lax.rem(jnp.asarray(instance, i32), n) if n > 1 else 0

    def slot_read(self, tensor: str, phase: Phase, iteration: Index) -> Index:
        """The slot of the instance that a phase reads."""
        return self.incarnation(tensor, read_instance(self.graph, tensor, phase, iteration))

    # Loads and stores.

    def load(self, request: Request) -> jax.Array:
        if self.interpret:
            return request.value()
        if not request.shape:
            return request.target()[...]
        return plgpu.load(request.target(), layout=request.layout, optimized=False)

    def load_handed_over(self, requests: Sequence[Request], tensors: Sequence[str], phase: Phase, iteration: Index) -> list[jax.Array]:
        """Loads what other workers wrote in this launch; waits for self-validating data to be there. tensors: of each request. phase: which reads."""
        if not requests:
            return []
        if not self.concurrent:
            return [self.load(r) for r in requests]
        checked = [self.schedule.tensor(t).handoff.self_validating for t in tensors]
        out: list[Any] = [None] * len(requests)
        for check in (True, False):
            chosen = [i for i, c in enumerate(checked) if c == check]
            if chosen:
                items = [_ptx.Item(r.target(), r.shape, r.ref.dtype, r.layout) for r in (requests[i] for i in chosen)]
                watch = self.watch(phase, iteration, Wanted.DATA, tensors=(tensors[i] for i in chosen))
                loaded = _ptx.load_validated(items, watch) if check else _ptx.load_relaxed(items)
                for i, array in zip(chosen, loaded, strict=True):
                    out[i] = array
        return out

    def store(self, request: Request, value: jax.Array) -> None:
        if self.interpret and request.view is not None:
            where, count = request.run()
            request.ref[(*request.lead, pl.ds(where, count))] = value.reshape(count)
        else:
            request.target()[...] = value

    def hand_over(self, tensor: str, phase: Phase, iteration: Index, request: Callable[[Index], Request], value: jax.Array) -> None:
        """Writes a tensor's rows, and clears them in the slot of the next instance, where former readers are done. `value` has the dtype that
        they cross as; request(slot) says where they lie."""
        written = written_instance(self.graph, tensor, phase, iteration)
        here = request(self.incarnation(tensor, written))
        self.store(here, value)
        if self.concurrent and clears(self.graph, self.schedule, tensor, phase):
            after = request(self.incarnation(tensor, written + 1))
            self.store(after, _ptx.blank(value.shape, value.dtype, here.layout))

    # Deadlines.

    @property
    def watched(self) -> Ref:
        """Shared memory for the deadline: what is left of the first row of the task table, which is the compute role's own."""
        return self.refs["tasks"].at[COMPUTE, 0, pl.ds(self.refs["tasks"].shape[-1] - WORDS, WORDS)]

    def watch(self, phase: Phase, iteration: Index, wanted: Wanted, *, event: str = "", tensors: Iterable[str] = ()) -> Watch | None:
        """What a wait for the event of a phase, or for some tensors, needs to give up at the deadline; None without one."""
        if self.deadline is None:
            return None
        noted = number(self.graph, self.schedule, Wait(phase.name, wanted, event), iteration)
        return Watch(self.watched, jnp.asarray(noted, i32), None if wanted is Wanted.EVENT else mask(phase, tensors))

    # Arithmetic that interpret mode has no word for.

    def mma(self, acc: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        if self.interpret:
            return acc + jnp.dot(a.astype(f32), b.astype(f32), precision=lax.Precision.HIGHEST)
        return plgpu.mma(acc, a, b)

    def times(self, n: int, body: Callable[..., Any], init: Carry) -> Any:
        """`fori_loop` that stays a loop: the compiler would unroll a count it can see, and code is scarce."""
        if n == 1:
            return body(0, init)
        return lax.fori_loop(0, n if self.interpret else _ptx.opaque(i32(n)), body, init)

    # Times.

    def stamp(self, phase: Phase, iteration: Index, moment: str) -> None:
        """Notes when this worker's compute got there, if times are asked for."""
        if "stamps" in self.refs:
            at = self.worker * (step_count(self.graph) * len(MOMENTS)) + self._step(phase, iteration) * len(MOMENTS) + MOMENTS.index(moment)
            _ptx.stamp(self.refs["stamps"].at[pl.ds(at, 1)])

    def _step(self, phase: Phase, iteration: Index) -> Any:
        before = sum(s.repeats * len(s.phases) for s in self.graph.segments[: phase.segment])
        phases = self.graph.segments[phase.segment].phases
        return before + iteration * len(phases) + phases.index(phase.name)


MOMENTS = ("arrived", "known", "read", "folded", "signalled")  # of one execution of a phase, as the simulator's spans have them


def step_count(graph: OpGraph) -> int:
    """Executions of phases in one decode step."""
    return sum(s.repeats * len(s.phases) for s in graph.segments)


def spread(v: jax.Array, shape: tuple[int, ...], axis: int, layout: Layout) -> jax.Array:
    """A vector along `axis` of `shape`, repeated over the other."""
    return plgpu.layout_cast(lax.broadcast_in_dim(v, shape, (axis,)), layout)


def zeros(shape: tuple[int, ...], layout: Layout) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, f32), layout)
