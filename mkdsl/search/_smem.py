"""The shared-memory model: everything one worker keeps in shared memory, as named extents.

An extent has bytes and a depth (copies in flight: the ring's stages). Its lifetime is the whole kernel in this version: the resident and
the finished rows are shared by all phases, which is why they count as their maximum over phases and not as their sum.
"""

import dataclasses
from collections.abc import Iterable

from mkdsl.graph import OpGraph, Phase
from mkdsl.search._schedule import PhasePlan

ALIGNMENT = 1024  # bytes: what a swizzled array starts at
ROWS = 64  # mma rows of a tile
RESERVE = 4096  # bytes: barriers and alignment


@dataclasses.dataclass(frozen=True)
class Extent:
    """One kind of shared memory of a worker: `depth` copies of `bytes`, live for the whole kernel."""

    name: str
    bytes: int
    depth: int = 1

    @property
    def total(self) -> int:
        return self.bytes * self.depth


@dataclasses.dataclass(frozen=True)
class SharedMemory:
    """All of one worker's shared memory."""

    extents: tuple[Extent, ...]

    @property
    def total(self) -> int:
        return sum(e.total for e in self.extents)

    def __str__(self) -> str:
        lines = [f"  {e.name:<12}{e.bytes:>9} x {e.depth:<3}= {e.total:>7} bytes" for e in self.extents]
        return "\n".join([*lines, f"  {'sum':<12}{self.total:>24} bytes"])


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def columns(padded_batch: int, parts: int) -> int:
    """Columns of the mma's right-hand side: (sequence, part) pairs, at least 8."""
    return round_up(padded_batch * parts, 8)


def resident_bytes(phase: Phase, plan: PhasePlan, padded_batch: int) -> int:
    """The staged operand of a fold, bfloat16: one piece of every part."""
    return columns(padded_batch, plan.parts) * (phase.k // plan.parts // plan.pieces) * 2


def finished_bytes(phase: Phase, plan: PhasePlan, padded_batch: int) -> int:
    """A fold's finished mma rows, float32: of the tiles that finish together, for each of a part's matrices and each sequence."""
    return plan.slots(phase) * padded_batch * ROWS * 4


def added_bytes(phase: Phase, plan: PhasePlan, padded_batch: int) -> int:
    """Rows of older tensors that a fold's finish adds, float32, copied to shared memory ahead of time."""
    return len(phase.parts) * len(phase.row_reads) * padded_batch * plan.group * plan.rows * 4


def attention_bytes(phase: Phase, plan: PhasePlan) -> tuple[int, int, int, int]:
    """Queries, probabilities, the result, and the token's own scores, keys and values."""
    c = round_up(phase.heads // phase.kv_heads, 8)
    return c * phase.head_dim * 2, plan.chunk * c * 2, phase.head_dim * c * 4, 2 * c * 4 + phase.head_dim * 8


def fixed_extents(graph: OpGraph, padded_batch: int) -> tuple[Extent, ...]:
    """What does not depend on how phases are tiled."""
    table = 4 * round_up(2 * sum(len(p.parts) for p in graph.phases), 128) * 2
    return (
        Extent("statistics", round_up(ROWS * 4 * max(8, padded_batch) + 2048, ALIGNMENT)),
        Extent("tasks", round_up(table, ALIGNMENT)),
        Extent("reserve", RESERVE),
    )


def shared_memory(graph: OpGraph, plans: Iterable[PhasePlan], *, padded_batch: int, stages: int, stage_bytes: int) -> SharedMemory:
    """The extents of a schedule.

    Args:
      graph: what is scheduled.
      plans: of all its phases.
      padded_batch: columns of the mma per part.
      stages, stage_bytes: the ring.
    """
    resident, finished, added, attention = [0], [0], [0], [(0, 0, 0, 0)]
    for plan in plans:
        phase = graph.phase(plan.name)
        if phase.kind == "fold":
            resident.append(resident_bytes(phase, plan, padded_batch))
            finished.append(finished_bytes(phase, plan, padded_batch))
            added.append(added_bytes(phase, plan, padded_batch))
        if phase.kind == "attention":
            attention.append(attention_bytes(phase, plan))
    named = [("ring", stage_bytes, stages), ("resident", max(resident), 1), ("finished", max(finished), 1), ("added", max(added), 1)]
    names = ("queries", "scores", "result", "own")
    named += [(f"attn {name}", max(sizes), 1) for name, sizes in zip(names, zip(*attention, strict=True), strict=True)]
    extents = [Extent(name, round_up(size, ALIGNMENT), depth) for name, size, depth in named if size]
    return SharedMemory((*extents, *fixed_extents(graph, padded_batch)))
