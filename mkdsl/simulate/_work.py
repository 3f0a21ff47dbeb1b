"""What a worker does in one execution of a phase, in microseconds by a GPU's profile: the cost model adds it up, the simulator plays it."""

import dataclasses
import functools
import math
from collections.abc import Sequence

from mkdsl.graph import ITEMSIZE, AttentionPhase, FoldPhase, MapPhase, OpGraph, Phase, Tensor
from mkdsl.schedule import (
    EPILOGUE_VALUES,
    KIB,
    MMA_ROWS,
    SHARING,
    AttentionPlan,
    FoldPlan,
    MapPlan,
    PhasePlan,
    Profile,
    columns,
    narrowest,
)

UNIT = 32 * KIB  # bytes: what the profile's per-unit times are of
THREADS = 128  # of a warpgroup
HANDED = 8 * KIB  # bytes: what a measured hand-off reads


@dataclasses.dataclass(frozen=True)
class Work:
    """One worker's part of one execution.

    read: reading activations from L2, beyond what a hand-off's measured time includes. before: from the data to the first mma.
    runs: (pause, units) in order. The pause comes before so many units, for another epilogue or another K stage of the resident.
    unit_us: computing a unit that is there. after: from the last unit to the signal.
    unit_bytes: of a unit. streamed_bytes: as many bytes take as long to fetch at full bandwidth; more where rows are short.
    """

    read: float
    before: float
    runs: tuple[tuple[float, int], ...]
    unit_us: float
    after: float
    unit_bytes: int = 0
    streamed_bytes: float = 0.0

    @functools.cached_property
    def units(self) -> int:
        return sum(n for _, n in self.runs)

    @property
    def pauses(self) -> float:
        return sum(pause for pause, _ in self.runs)

    @functools.cached_property
    def longest_pause(self) -> float:
        """Of those between units."""
        return max((pause for pause, _ in self.runs[1:]), default=0.0)


class Workload:
    """The work of one graph's phases on one GPU for one batch."""

    def __init__(self, graph: OpGraph, batch: int, padded_batch: int, profile: Profile, dtypes: dict[str, str] | None = None) -> None:
        """`dtypes`: what each tensor crosses as; by default the narrowest that it may."""
        self.graph, self.batch, self.padded_batch, self.profile = graph, batch, padded_batch, profile
        self.dtypes = dtypes or {}

    def of(self, phase: Phase, plan: PhasePlan, counts: Sequence[int], splits: dict[str, int]) -> Work:
        """The work of one worker.

        Args:
          phase, plan: what is executed, and how.
          counts: items of each part that the worker folds, its whole cluster's if that shares them.
          splits: of the attention results that the phase reads.
        """
        match phase, plan:
            case FoldPhase(), FoldPlan():
                return self._fold(phase, plan, counts, splits)
            case AttentionPhase(), AttentionPlan():
                return self._attention(phase, plan, counts, splits)
            case MapPhase(), MapPlan():
                return self._map(phase, plan, counts, splits)
        raise TypeError(f"{phase.name}: a {type(plan).__name__} for a {type(phase).__name__}")

    # Reading activations.

    def _read(self, phase: Phase, splits: dict[str, int], share: float = 1.0) -> float:
        total = sum(self._bytes(self.graph.tensors[name], splits.get(name, 1)) for name in phase.reads)
        return max(0.0, total * share - HANDED) / self.profile.l2_rate * 1e6

    def _input(self, phase: Phase, splits: dict[str, int], cluster: int, loads: float) -> float:
        """Of what a prologue reads whole: as its bytes take, or its loads."""
        return max(self._read(phase, splits, 1 / cluster), loads * self.profile.load_us)

    def _loads(self, phase: Phase, splits: dict[str, int], stretch: int, split_k: int, width: int) -> float:
        """How many loads one thread makes while a prologue goes through its vectors.

        Vectors are seen as rows of `stretch` columns, `split_k` rows of each sequence, and are loaded in blocks of up to 8 rows x `width`
        columns, by vectors of up to 4 elements a thread; log-sum-exps of splits one by one.
        """
        rows = self.padded_batch * split_k
        blocks = stretch // width * -(-rows // 8)
        height = min(8, rows)
        vectors = max(1.0, height * width / THREADS / min(4, max(1, height * width // THREADS)))
        tensors = [(self.graph.tensors[name], splits.get(name, 1)) for name in phase.reads]
        return sum(blocks * n * (vectors + (n > 1)) for t, n in tensors if self._dtype(t, n) == "float32")

    def _dtype(self, tensor: Tensor, splits: int) -> str:
        return self.dtypes.get(tensor.name) or narrowest(tensor, splits)

    def _bytes(self, tensor: Tensor, splits: int) -> float:
        """Of a tensor as it crosses, with the log-sum-exps of its splits."""
        each = ITEMSIZE[self._dtype(tensor, splits)] + (ITEMSIZE["float32"] / SHARING if splits > 1 else 0.0)
        return self.batch * tensor.width * splits * each

    # Folds.

    def _fold(self, phase: FoldPhase, plan: FoldPlan, counts: Sequence[int], splits: dict[str, int]) -> Work:
        p, unit_bytes, stretch = self.profile, plan.unit_bytes(phase), phase.k // plan.split_k // plan.cluster
        read = self._input(phase, splits, plan.cluster, self._loads(phase, splits, stretch, plan.split_k, math.gcd(plan.tile_k, 64)))
        units = stretch // plan.tile_k
        tiles = sum(n * len(part.weights) for n, part in zip(counts, phase.parts, strict=True))
        epilogues = -(-max(counts) // (plan.epilogue_tiles * plan.cluster))
        narrow = max(1.0, p.row_bytes / (plan.tile_k * phase.itemsize))
        sent = min(self._together(phase, plan), -(-tiles // plan.cluster))
        last = min(plan.epilogue_tiles, -(-max(counts) // plan.cluster))
        return Work(
            read=read,
            before=p.prologue_us,
            runs=self._runs(phase, plan, epilogues, tiles * units, read),
            unit_us=self._unit_us(plan, unit_bytes) + self._store_us(plan) * plan.k_stages / units,
            after=p.epilogue_us + self._epilogue(phase, plan, last) + self._exchange(plan.cluster, sent * MMA_ROWS),
            unit_bytes=unit_bytes,
            streamed_bytes=unit_bytes * narrow,
        )

    def _unit_us(self, plan: FoldPlan, unit_bytes: int) -> float:
        """Folding a unit that is there past all columns of the resident."""
        p, further = self.profile, columns(self.padded_batch, plan.split_k) - 8
        if plan.instruction == "wgmma":
            return p.unit_us + p.wgmma_wait_us + (p.wgmma_us + p.wgmma_column_us * further) * unit_bytes / UNIT
        return p.unit_us + (p.mma_us + p.column_us * further) * unit_bytes / UNIT

    def _store_us(self, plan: FoldPlan) -> float:
        """After a tile's units of one K stage: its sums to shared memory, added to those of earlier K stages if there are several."""
        return self.profile.store_us * columns(self.padded_batch, plan.split_k) * (1 if plan.k_stages == 1 else 2)

    def _epilogue(self, phase: FoldPhase, plan: FoldPlan, tiles: int) -> float:
        """Adding up the sums of so many tiles over matrices, pieces of K and peers, in blocks of up to EPILOGUE_VALUES values."""
        size = max(1, min(tiles, EPILOGUE_VALUES // (plan.rows * self.padded_batch)))
        loads = max(len(part.weights) for part in phase.parts) * plan.split_k * plan.cluster
        return -(-tiles // size) * loads * max(1.0, size * plan.rows * self.padded_batch / THREADS) * self.profile.value_us

    def _exchange(self, cluster: int, rows: float) -> float:
        """Until a cluster's workers have each other's sums: so many mma rows of each sequence from each of them."""
        if cluster == 1:
            return 0.0
        return self.profile.exchange_us + cluster * rows * self.padded_batch * ITEMSIZE["float32"] / self.profile.exchange_rate * 1e6

    @staticmethod
    def _together(phase: FoldPhase, plan: FoldPlan) -> int:
        """Tiles of a worker that are finished together, of every matrix."""
        return plan.epilogue_tiles * max(len(part.weights) for part in phase.parts)

    def _runs(self, phase: FoldPhase, plan: FoldPlan, epilogues: int, units: int, read: float) -> tuple[tuple[float, int], ...]:
        """A run of units for each epilogue and K stage. For each epilogue the resident's K stages are staged anew."""
        p, out = self.profile, []
        between = p.next_epilogue_us + self._epilogue(phase, plan, plan.epilogue_tiles)
        between += self._exchange(plan.cluster, self._together(phase, plan) * MMA_ROWS)
        count = epilogues * plan.k_stages
        for run in range(count):
            pause = p.k_stage_us if run and plan.k_stages > 1 else 0.0
            if run and run % plan.k_stages == 0:
                pause += between + (read if plan.k_stages > 1 else 0.0)
            out.append((pause, (run + 1) * units // count - run * units // count))
        return tuple(out)

    # The other kinds.

    def _attention(self, phase: AttentionPhase, plan: AttentionPlan, counts: Sequence[int], splits: dict[str, int]) -> Work:
        p, unit_bytes = self.profile, plan.unit_bytes(phase)
        blocks = math.ceil(phase.attended / plan.block / (plan.splits * plan.cluster))
        exchange = self._exchange(plan.cluster, phase.head_dim * columns(1, phase.queries) / self.padded_batch)

        def pause(item: int) -> float:
            """Before an item; every so many of them a cluster's workers exchange what they have."""
            return (p.attention_us if item else 0.0) + (exchange if item and item % plan.cluster == 0 else 0.0)

        return Work(
            read=self._read(phase, splits, 1 / (self.batch * phase.kv_heads)),
            before=0.6 * p.attention_us,
            runs=tuple((pause(item), 2 * blocks) for item in range(counts[0])),
            unit_us=p.block_us / 2 + p.mma_us * unit_bytes / UNIT,
            after=0.4 * p.attention_us + exchange,
            unit_bytes=unit_bytes,
            streamed_bytes=unit_bytes,
        )

    def _map(self, phase: MapPhase, plan: MapPlan, counts: Sequence[int], splits: dict[str, int]) -> Work:
        stretch = max((self.graph.tensors[name].width for name in phase.reads), default=0) // plan.split_k
        loads = self._loads(phase, splits, stretch, plan.split_k, math.gcd(stretch, 64)) if stretch else 0.0
        read = self._input(phase, splits, 1, loads)
        return Work(
            read=read, before=self.profile.map_us, runs=(((sum(counts) - 1) * self.profile.next_epilogue_us, 0),), unit_us=0.0, after=0.0
        )
