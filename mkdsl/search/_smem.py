"""The shared-memory model, in three dimensions: how large a buffer is, how many of it there are, and when it lives.

extent: the bytes of one copy. depth: copies in flight (the ring's stages). lifetime: the whole kernel, or one phase. What lives in one
phase lies where the next phase's buffers will: one warpgroup stages, folds and finishes, phase after phase, and waits for another that
folds. So the peak is what lives for the whole kernel plus the most that any phase has of its own, and it is reached in that phase. Rows
that a worker keeps for a later finish of its own must outlive the phases between: they are counted as living for the whole kernel.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

from mkdsl.graph import OpGraph, Phase
from mkdsl.search._own import kept_rows
from mkdsl.search._schedule import PhasePlan

ALIGNMENT = 1024  # bytes: what a swizzled array starts at
ROWS = 64  # mma rows of a tile
RESERVE = 4096  # bytes: the search's allowance for scratch, exchange and barriers
SCRATCH = 2048  # bytes: Mosaic's, for reductions over the warps of a warpgroup
WORDS = 32  # bytes: a cluster's two barriers and counts
BARRIER = 8  # bytes


@dataclasses.dataclass(frozen=True)
class Extent:
    """One buffer of a worker: `depth` copies of `bytes`, live in one phase, or for the whole kernel (phase "")."""

    name: str
    bytes: int
    depth: int = 1
    phase: str = ""

    @property
    def total(self) -> int:
        return self.bytes * self.depth


@dataclasses.dataclass(frozen=True)
class SharedMemory:
    """All of one worker's shared memory over the schedule. `phases`: in program order."""

    extents: tuple[Extent, ...]
    phases: tuple[str, ...]

    @functools.cached_property
    def by_phase(self) -> dict[str, list[Extent]]:
        """What lives in each phase only; under "" what lives for the whole kernel."""
        out: dict[str, list[Extent]] = {name: [] for name in ("", *self.phases)}
        for e in self.extents:
            out[e.phase].append(e)
        return out

    def live(self, phase: str) -> tuple[Extent, ...]:
        """What lives while a phase runs."""
        return (*self.by_phase[""], *self.by_phase[phase])

    def bytes_in(self, phase: str) -> int:
        return sum(e.total for e in self.live(phase))

    @functools.cached_property
    def peak(self) -> str:
        """The phase in which most is live; of several the first."""
        return max(self.phases, key=self.bytes_in)

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.bytes_in(self.peak)

    @property
    def allocated(self) -> int:
        """Bytes that the kernel asks for: all but the reserve."""
        return self.total - sum(e.total for e in self.by_phase[""] if e.name == "reserve")

    def __str__(self) -> str:
        lines = [_line(e.name, e.bytes, e.depth, e.total) for e in self.by_phase[""]]
        for phase in self.phases:
            own = self.by_phase[phase]
            lines += [f"  in {phase}: {self.bytes_in(phase)} bytes{', the peak' if phase == self.peak else ''}"] if own else []
            lines += ["  " + _line(e.name, e.bytes, e.depth, e.total) for e in own]
        return "\n".join(lines)


def _line(name: str, size: int, depth: int, total: int) -> str:
    return f"  {name:<12}{size:>9} x {depth:<3}= {total:>7} bytes"


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def columns(padded_batch: int, parts: int) -> int:
    """Columns of the mma's right-hand side: (sequence, part) pairs, at least 8."""
    return round_up(padded_batch * parts, 8)


def resident_bytes(phase: Phase, plan: PhasePlan, padded_batch: int) -> int:
    """The staged operand of a fold, bfloat16: one piece of every part."""
    return columns(padded_batch, plan.parts) * (phase.k // plan.parts // plan.cluster // plan.pieces) * 2


def finished_bytes(slots: int, padded_batch: int) -> int:
    """A fold's finished mma rows, float32: `slots` tiles that wait for their finish (`PhasePlan.slots`, times `sets`), of each sequence."""
    return slots * padded_batch * ROWS * 4


def added_bytes(phase: Phase, plan: PhasePlan, padded_batch: int) -> int:
    """Rows of older tensors that a fold's finish adds, float32, copied to shared memory ahead of time."""
    return len(phase.parts) * len(plan.fetched(phase)) * padded_batch * plan.group * plan.rows * 4


def phase_extents(phase: Phase, plan: PhasePlan, slots: int, sets: int, padded_batch: int) -> tuple[Extent, ...]:
    """What lives in one phase. slots, sets: as `PhasePlan` has them."""
    if phase.kind == "fold":
        sizes = {
            "resident": resident_bytes(phase, plan, padded_batch),
            "finished": finished_bytes(slots * sets, padded_batch),
            "added": added_bytes(phase, plan, padded_batch),
        }
    elif phase.kind == "attention":
        sizes = attention_bytes(phase, plan, sets)
    else:
        sizes = {}
    return tuple(Extent(name, round_up(size, ALIGNMENT), phase=phase.name) for name, size in sizes.items() if size)


def attention_bytes(phase: Phase, plan: PhasePlan, sets: int) -> dict[str, int]:
    """Queries and probabilities (bfloat16), the result and the scores (float32), the token's own key and value (bfloat16); of a cluster,
    results with their log-sum-exps that others send (float32)."""
    c = round_up(phase.heads // phase.kv_heads, 8)
    d = phase.head_dim
    own = {"queries": c * d * 2, "scores": plan.chunk * c * 2, "result": d * c * 4, "own scores": c * 4, "own k, v": 2 * d * 2}
    return own | {"received": sets * (d + 1) * c * 4 if plan.cluster > 1 else 0}


def fixed_bytes(graph: OpGraph, padded_batch: int, cluster: int, warpgroups: int = 2) -> int:
    """What the search sets aside for `fixed_extents` before it knows the tiles and the ring's depth: never less than they take."""
    most = _statistics(graph, 8 * padded_batch, cluster)
    statistics = max(most, round_up(ROWS * 4 * max(8, padded_batch) + SCRATCH, ALIGNMENT))
    return statistics + _tasks(graph, cluster, warpgroups) + RESERVE


def _statistics(graph: OpGraph, rows: int, cluster: int) -> int:
    """Partial reductions over the rows (sequence, part) of prologues, float32: a worker's own, and what each of its cluster sends."""
    own = max((p.reductions for p in graph.phases), default=0) * rows * 4
    return round_up(own, ALIGNMENT) + (round_up(cluster * own, ALIGNMENT) if cluster > 1 else 0)


def _tasks(graph: OpGraph, cluster: int, warpgroups: int) -> int:
    """For each of `warpgroups` the task table's rows of the cluster's workers."""
    return round_up(4 * round_up(2 * sum(len(p.parts) for p in graph.phases), 128) * warpgroups * cluster, ALIGNMENT)


def fixed_extents(graph: OpGraph, plans: Sequence[PhasePlan], padded_batch: int, stages: int) -> tuple[Extent, ...]:
    """What lives for the whole kernel, besides the ring and kept rows. The reserve is what they leave of `fixed_bytes`; the kernel does not ask
    for it."""
    cluster, computing = max(plan.cluster for plan in plans), max(plan.warpgroups for plan in plans)
    sizes = {
        "statistics": _statistics(graph, columns(padded_batch, max(plan.parts for plan in plans)), cluster),
        "tasks": _tasks(graph, cluster, 1 + computing),
        "exchange": round_up(WORDS, ALIGNMENT) if cluster > 1 else 0,
        "scratch": SCRATCH,
        "barriers": BARRIER * (2 * stages + (2 if computing > 1 else 0)),
    }
    sizes["reserve"] = fixed_bytes(graph, padded_batch, cluster, 1 + computing) - sum(sizes.values())
    return tuple(Extent(name, size) for name, size in sizes.items() if size)


def kept_extents(graph: OpGraph, plans: Sequence[PhasePlan], padded_batch: int) -> tuple[Extent, ...]:
    """Rows that a worker keeps, float32, of each sequence."""
    rows = kept_rows(graph, plans)
    return tuple(Extent(f"kept {tensor}", round_up(padded_batch * n * 4, ALIGNMENT)) for tensor, n in rows.items())


def shared_memory(graph: OpGraph, plans: Iterable[PhasePlan], *, padded_batch: int, stages: int, stage_bytes: int) -> SharedMemory:
    """The buffers of a schedule.

    Args:
      graph: what is scheduled.
      plans: of its phases.
      padded_batch: columns of the mma per part.
      stages, stage_bytes: the ring.
    """
    plans = tuple(plans)
    chosen = [(graph.phase(plan.name), plan) for plan in plans]
    slots = [plan.slots(phase) if phase.kind == "fold" else 0 for phase, plan in chosen]
    own = [e for (phase, plan), n in zip(chosen, slots, strict=True) for e in phase_extents(phase, plan, n, plan.sets, padded_batch)]
    ring = (Extent("ring", stage_bytes, stages),) if stages else ()
    fixed = fixed_extents(graph, plans, padded_batch, stages)
    return SharedMemory((*ring, *fixed, *kept_extents(graph, plans, padded_batch), *own), tuple(plan.name for _, plan in chosen))
