"""`Schedule`: every decision of one megakernel, as plain frozen data that prints and round-trips through JSON."""

import dataclasses
import functools
from typing import Any

from mkdsl.graph import Phase, Tensor

ITEMSIZE = {"bfloat16": 2, "float32": 4}
SHARING = 16  # features of attention's split result that share a log-sum-exp: no head and no block of a resident is narrower
Range = tuple[int, int]  # first item, count


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """How one phase is tiled and spread over the workers.

    A fold's tile is 64 mma rows: `rows` output rows x `parts` parts of the streamed axis (rows * parts = 64), streamed in units of `chunk`
    elements per mma row; each part spans k / parts elements. The resident is staged in `pieces` equal pieces of every part, one after the
    other, each folded past all of a worker's tiles before the next: a K-split in time. `cluster` workers of a thread-block cluster fold their
    tiles together, each past its own of as many pieces of the resident, and send each other their sums through distributed shared memory,
    `group` tiles of each at a time: a K-split in space. An attention item is (sequence, kv head, split): split s of `splits` folds cache blocks
    s, s + splits, ... of `chunk` positions, each worker of a `cluster` its share of them. A map's item is `rows` features of one sequence.

    tasks: per part of the phase, per worker, its contiguous items. An item of a fold is a tile; items of a part number rows / plan.rows
      (attention: batch * kv_heads * splits; map: batch * rows / plan.rows).
    instruction: of a linear fold's tensor cores: "mma", which has both operands in registers, or "wgmma", which reads them where they lie.
    group: at most this many items of a fold part are finished together.
    waits: names of phases whose event must have come before this phase's prologue reads (same iteration; the previous one for phases
      that come later in the loop; all iterations for phases of earlier segments).
    fence: before it waits, every worker that takes part in this phase orders its earlier clears before its later signals.
    """

    name: str
    rows: int
    parts: int = 1
    chunk: int = 0
    pieces: int = 1
    cluster: int = 1
    splits: int = 1
    group: int = 1
    instruction: str = "mma"
    tasks: tuple[tuple[Range, ...], ...]
    waits: tuple[str, ...]
    fence: bool = False

    def count(self, part: int, worker: int) -> int:
        return self.tasks[part][worker][1]

    def slots(self, phase: Phase) -> int:
        """Tiles whose finished rows one worker holds at once: all of its tiles, or one group of one part where that is less."""
        matrices = [len(part.weights) for part in phase.parts]
        workers = range(len(self.tasks[0]))
        if self.grouped:
            return self.group * max(matrices)
        return max(sum(n * part[w][1] for n, part in zip(matrices, self.tasks, strict=True)) for w in workers)

    @property
    def sets(self) -> int:
        """How often a worker holds those tiles: as summed by each of its cluster, and where there are groups, of two in turn."""
        return self.sets_if(self.grouped)

    def sets_if(self, grouped: bool) -> int:
        return self.cluster * (2 if self.cluster > 1 and grouped else 1)

    def rounds(self, part: int) -> int:
        """Groups of a part in which a cluster's workers fold each other's tiles."""
        return max(-(-n // self.group) for _, n in self.tasks[part])

    @functools.cached_property
    def grouped(self) -> bool:
        """Whether some worker has more items of a part than are finished together."""
        return any(n > self.group for part in self.tasks for _, n in part)

    def mates(self, worker: int) -> range:
        """The workers of its cluster, itself included."""
        first = worker - worker % self.cluster
        return range(first, first + self.cluster)

    def folded(self, worker: int) -> tuple[int, ...]:
        """Items of each part that a worker folds: of a cluster that shares them, all."""
        return tuple(sum(part[mate][1] for mate in self.mates(worker)) for part in self.tasks)

    @functools.cached_property
    def participants(self) -> tuple[int, ...]:
        """Workers that, or a mate of whom, have at least one item."""
        return tuple(w for w in range(len(self.tasks[0])) if any(self.folded(w)))


def narrowest(tensor: Tensor, splits: int) -> str:
    """The dtype of fewest bytes in which a tensor may cross without a bit of the result changing."""
    return "bfloat16" if tensor.rounds and splits == 1 else "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """How a tensor crosses phases.

    handoff: "data" (self-validating words: all ones until written; a relaxed counter says when to look) or "counter" (plain words
      behind a release/acquire counter).
    incarnations: copies used in turn by successive instances (iterations); with "data", whoever writes a row in one incarnation clears
      the same row in the next.
    splits: partial carries in slots of their own, merged by the readers in slot order (attention only).
    dtype: "bfloat16" only of what all readers round to that (`Tensor.rounds`), and not of partial carries, which are merged first.
    """

    name: str
    handoff: str = "data"
    incarnations: int = 2
    splits: int = 1
    dtype: str = "float32"

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A verified plan for one (graph, batch, target).

    stages, stage_bytes: the ring. window: units the loader keeps in flight. smem_bytes: all shared memory of one worker.
    predicted_us: by the cost model, for one step; a prediction. us: the same per phase execution.
    """

    target: str
    batch: int
    padded_batch: int
    workers: int
    stages: int
    stage_bytes: int
    window: int
    smem_bytes: int
    phases: tuple[PhasePlan, ...]
    tensors: tuple[TensorPlan, ...]
    predicted_us: float
    us: tuple[tuple[str, float], ...]

    def preloads(self, phase: Phase) -> bool:
        """Whether a fold asks for the older rows that its finish adds before it waits: only words that prove themselves can be."""
        return phase.kind == "fold" and all(self.tensor(t).handoff == "data" for t in phase.row_reads)

    @property
    def cluster(self) -> int:
        """Workers of a thread-block cluster."""
        return max(p.cluster for p in self.phases)

    def phased(self) -> "Schedule":
        """The same tiles for launches of one phase each: every tile is folded by its owner, what clusters split in space is split in time."""
        phases = tuple(dataclasses.replace(p, cluster=1, pieces=p.pieces * p.cluster) for p in self.phases)
        return dataclasses.replace(self, phases=phases)

    @property
    def order(self) -> tuple[str, ...]:
        """The phases in program order: one of the graph's orders."""
        return tuple(p.name for p in self.phases)

    def plan(self, phase: str) -> PhasePlan:
        return self._plans[phase]

    def tensor(self, name: str) -> TensorPlan:
        return self._tensors[name]

    @functools.cached_property
    def _plans(self) -> dict[str, PhasePlan]:
        return {p.name: p for p in self.phases}

    @functools.cached_property
    def _tensors(self) -> dict[str, TensorPlan]:
        return {t.name: t for t in self.tensors}

    def __str__(self) -> str:
        us = dict(self.us)
        lines = [f"{self.target}, batch {self.batch}: {self.predicted_us:.0f} us predicted"]
        lines += [f"  ring: {self.stages} x {self.stage_bytes} bytes, {self.window} in flight; {self.smem_bytes} bytes of shared memory"]
        for p in self.phases:
            lines.append(
                f"  {p.name}: {p.rows} x {p.parts}, chunk {p.chunk}, pieces {p.pieces}, cluster {p.cluster}, splits {p.splits}, {us[p.name]:.1f} us"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Schedule":
        fields = dict(data)
        fields["phases"] = tuple(PhasePlan(**p | {name: _tuples(p[name]) for name in ("tasks", "waits")}) for p in data["phases"])
        fields["tensors"] = tuple(TensorPlan(**t) for t in data["tensors"])
        fields["us"] = _tuples(data["us"])
        return Schedule(**fields)


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list | tuple) else x
