"""The shared-memory model, in three dimensions: how large a buffer is, how many of it there are, and when it lives.

extent: the bytes of one copy. depth: copies in flight (the ring's stages). lifetime: the whole kernel, or one phase. What lives in one
phase lies where the next phase's buffers will: one warpgroup stages, folds and finishes, phase after phase.
So the peak is what lives for the whole kernel plus the most that any phase has of its own, and it is reached in that phase.
"""

import dataclasses
import functools
from collections.abc import Iterable

from mkdsl.graph import OpGraph, Phase
from mkdsl.search._schedule import PhasePlan

ALIGNMENT = 1024  # bytes: what a swizzled array starts at
ROWS = 64  # mma rows of a tile
RESERVE = 4096  # bytes: barriers and alignment


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
        """Bytes at the peak: what the kernel asks for."""
        return self.bytes_in(self.peak)

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
    return len(phase.parts) * len(phase.row_reads) * padded_batch * plan.group * plan.rows * 4


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


def fixed_extents(graph: OpGraph, padded_batch: int, cluster: int) -> tuple[Extent, ...]:
    """What lives for the whole kernel and does not depend on how phases are tiled: partial reductions, a cluster's besides, for both roles the
    task table's rows of the cluster's workers, barriers."""
    sources = 1 if cluster == 1 else 1 + cluster
    reductions = sources * max((p.reductions for p in graph.phases), default=0) * 8 * padded_batch * 4
    table = 4 * round_up(2 * sum(len(p.parts) for p in graph.phases), 128) * 2 * cluster
    return (
        Extent("statistics", round_up(max(reductions, ROWS * 4 * max(8, padded_batch) + 2048), ALIGNMENT)),
        Extent("tasks", round_up(table, ALIGNMENT)),
        Extent("reserve", RESERVE),
    )


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
    fixed = fixed_extents(graph, padded_batch, max(plan.cluster for plan in plans))
    return SharedMemory((*ring, *fixed, *own), tuple(plan.name for _, plan in chosen))
