"""How one phase is tiled and spread over the workers: a record for each kind of phase, with only the decisions that its kind has."""

import dataclasses
import functools
from typing import Any, ClassVar, Self

from mkdsl.graph import AttentionPhase, FoldPhase, MapPhase, Phase

MMA_ROWS = 64  # of a fold's tile: rows of the tensor cores' left-hand side
EPILOGUE_VALUES = 512  # of an epilogue's block: 4 for each thread of a warpgroup
SHARING = 16  # features of attention's split result that share a log-sum-exp: no head and no block of a resident is narrower
Range = tuple[int, int]  # first item, count
Tasks = tuple[tuple[Range, ...], ...]  # [part][worker]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """What is decided of every phase.

    tasks: for each part of the phase and each worker, its contiguous items (`items` says how many a part has).
    waits: names of phases whose event must have come before this phase's prologue reads: in the same iteration; in the previous one for
      phases that come later in the loop; in all iterations for phases of earlier segments.
    fence: before it waits, every worker that takes part in this phase orders its earlier clears before its later signals.
    """

    kind: ClassVar[str]
    name: str
    tasks: Tasks
    waits: tuple[str, ...]
    fence: bool = False

    # Decisions that some kinds do not have: what they are for those.
    cluster: ClassVar[int] = 1
    splits: ClassVar[int] = 1
    split_k: ClassVar[int] = 1
    epilogue_tiles: ClassVar[int] = 1

    def items(self, phase: Any, batch: int) -> tuple[int, ...]:
        """How many items each part of the phase has."""
        raise NotImplementedError

    def unit_bytes(self, phase: Any) -> int:
        """Bytes of one unit: what one stage of the ring holds of this phase. 0 if it streams nothing."""
        return 0

    def alone(self) -> Self:
        """The same tiles without clusters."""
        return self

    @property
    def tiling(self) -> str:
        """How the phase is cut, for print."""
        raise NotImplementedError

    def count(self, part: int, worker: int) -> int:
        return self.tasks[part][worker][1]

    def peers(self, worker: int) -> range:
        """The workers of its cluster, itself included."""
        first = worker - worker % self.cluster
        return range(first, first + self.cluster)

    def folded(self, worker: int) -> tuple[int, ...]:
        """Items of each part that a worker folds: all of its cluster's, which share them."""
        return tuple(sum(part[peer][1] for peer in self.peers(worker)) for part in self.tasks)

    @functools.cached_property
    def participants(self) -> tuple[int, ...]:
        """Workers that take part: they, or a peer, have at least one item."""
        return tuple(w for w in range(len(self.tasks[0])) if any(self.folded(w)))

    @functools.cached_property
    def several_epilogues(self) -> bool:
        """Whether some worker has more items of a part than are finished together."""
        return any(n > self.epilogue_tiles for part in self.tasks for _, n in part)

    def epilogues(self, part: int) -> int:
        """Epilogues of a part that the worker with most items has; in a cluster all workers go through as many."""
        return max(-(-n // self.epilogue_tiles) for _, n in self.tasks[part])

    @property
    def sets(self) -> int:
        """How often a worker holds the sums of an epilogue: once for each of its cluster, and for two epilogues in turn where there are several."""
        return self.sets_if(self.several_epilogues)

    def sets_if(self, several_epilogues: bool) -> int:
        return self.cluster * (2 if self.cluster > 1 and several_epilogues else 1)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind} | dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldPlan(PhasePlan):
    """A fold's tile is 64 mma rows: `rows` output rows, each cut into `split_k` pieces along K that lie under each other in the tile
    (intra-tile split-K). It is streamed in units of `tile_k` elements of each mma row. An item is a tile.

    k_stages: the resident is staged in so many equal pieces, one after the other, and each is folded past all of a worker's tiles before
      the next (split-K in time). cluster: so many workers of a thread-block cluster fold their tiles together, each past its own piece of
      the resident, and send each other their sums through distributed shared memory (split-K in space).
    epilogue_tiles: at most so many tiles of a part are finished together.
    instruction: of a linear fold's tensor cores: "mma" has both operands in registers, "wgmma" reads them where they lie.
    """

    kind: ClassVar[str] = FoldPhase.kind
    split_k: int = 1
    tile_k: int
    k_stages: int = 1
    cluster: int = 1
    epilogue_tiles: int = 1
    instruction: str = "mma"

    @property
    def rows(self) -> int:
        """Output rows of a tile."""
        return MMA_ROWS // self.split_k

    @property
    def tiling(self) -> str:
        splits = "".join(f", {name} {n}" for name, n in (("k_stages", self.k_stages), ("cluster", self.cluster)) if n > 1)
        return f"{self.rows} rows x split_k {self.split_k}, tile_k {self.tile_k}, epilogue of {self.epilogue_tiles}, {self.instruction}{splits}"

    def stage_k(self, phase: FoldPhase) -> int:
        """Elements of each mma row in one K stage of one worker."""
        return phase.k // self.split_k // self.cluster // self.k_stages

    def items(self, phase: FoldPhase, batch: int) -> tuple[int, ...]:
        return tuple(part.rows // self.rows for part in phase.parts)

    def unit_bytes(self, phase: FoldPhase) -> int:
        return MMA_ROWS * self.tile_k * phase.itemsize

    def alone(self) -> "FoldPlan":
        """What the cluster splits in space is split in time."""
        return dataclasses.replace(self, cluster=1, k_stages=self.k_stages * self.cluster)

    def slots(self, phase: FoldPhase) -> int:
        """Tiles whose sums one worker holds at once: all of its tiles, or those of one epilogue of one part where that is less."""
        matrices = [len(part.weights) for part in phase.parts]
        if self.several_epilogues:
            return self.epilogue_tiles * max(matrices)
        workers = range(len(self.tasks[0]))
        return max(sum(n * part[w][1] for n, part in zip(matrices, self.tasks, strict=True)) for w in workers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionPlan(PhasePlan):
    """An item is (sequence, kv head, split). Split s of `splits` folds the cache's blocks s, s + splits, ... of `block` positions, each worker
    of a `cluster` its share of them."""

    kind: ClassVar[str] = AttentionPhase.kind
    block: int
    splits: int = 1
    cluster: int = 1

    @property
    def tiling(self) -> str:
        splits = "".join(f", {name} {n}" for name, n in (("splits", self.splits), ("cluster", self.cluster)) if n > 1)
        return f"blocks of {self.block}{splits}"

    def items(self, phase: AttentionPhase, batch: int) -> tuple[int, ...]:
        return (batch * phase.kv_heads * self.splits,)

    def unit_bytes(self, phase: AttentionPhase) -> int:
        """Of a block's keys, or of its values."""
        return self.block * phase.head_dim * phase.itemsize

    def meets_pages(self, phase: AttentionPhase) -> bool:
        """Whether each half of a block, which one copy fetches, lies in one page of the table."""
        return phase.page is None or (phase.page % (self.block // 2) == 0 and phase.context % self.block == 0)

    def alone(self) -> "AttentionPlan":
        return dataclasses.replace(self, cluster=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapPlan(PhasePlan):
    """An item is `rows` features of one sequence. split_k: what the prologue reduces is laid over so many rows of a warpgroup."""

    kind: ClassVar[str] = MapPhase.kind
    rows: int
    split_k: int = 1

    @property
    def tiling(self) -> str:
        return f"{self.rows} rows"

    def items(self, phase: MapPhase, batch: int) -> tuple[int, ...]:
        return tuple(batch * part.rows // self.rows for part in phase.parts)


PLANS: dict[type[Phase], type[PhasePlan]] = {FoldPhase: FoldPlan, AttentionPhase: AttentionPlan, MapPhase: MapPlan}
BY_KIND = {phase.kind: plan for phase, plan in PLANS.items()}


def plan_from_json(data: dict[str, Any]) -> PhasePlan:
    """What `PhasePlan.to_json` returned, also after a way through JSON text."""
    fields = {name: value for name, value in data.items() if name != "kind"}
    tasks = tuple(tuple((first, count) for first, count in part) for part in data["tasks"])
    return BY_KIND[data["kind"]](**fields | {"tasks": tasks, "waits": tuple(data["waits"])})
