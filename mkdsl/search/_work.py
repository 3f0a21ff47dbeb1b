"""What a worker does in one execution of a phase, in microseconds by a GPU's profile: what the cost model adds up and the simulator plays."""

import dataclasses
import math
from collections.abc import Sequence

from mkdsl.graph import OpGraph, Phase, Tensor
from mkdsl.search._profile import KIB, Profile
from mkdsl.search._schedule import ITEMSIZE, SHARING, PhasePlan, narrowest
from mkdsl.search._smem import ROWS, columns

UNIT = 32 * KIB  # bytes: what the profile's per-unit times are of
THREADS = 128  # of a warpgroup
FRAME = 512  # values of a finish's block, 4 per thread
HANDED = 8 * KIB  # bytes: what a measured hand-off reads


@dataclasses.dataclass(frozen=True)
class Work:
    """One worker's part of one execution.

    read: of activations from L2, beyond what a hand-off's measured time includes. before: from the data to the first mma. runs: (pause,
    units) in order: the pause before so many units, for another group's finish or another piece of the resident. unit_us: compute of a
    unit that is there. after: from the last unit to the signal. unit_bytes: of a stage; streamed_bytes: what fetching it takes at full
    bandwidth, more where rows are short.
    """

    read: float
    before: float
    runs: tuple[tuple[float, int], ...]
    unit_us: float
    after: float
    unit_bytes: int = 0
    streamed_bytes: float = 0.0

    @property
    def units(self) -> int:
        return sum(n for _, n in self.runs)

    @property
    def pauses(self) -> float:
        return sum(pause for pause, _ in self.runs)


class Workload:
    """The work of one graph's phases on one GPU for one batch."""

    def __init__(self, graph: OpGraph, batch: int, padded_batch: int, profile: Profile, dtypes: dict[str, str] | None = None) -> None:
        """`dtypes`: what each tensor crosses as; by default the narrowest that it may."""
        self.graph, self.batch, self.padded_batch, self.profile = graph, batch, padded_batch, profile
        self.dtypes = dtypes or {}

    def of(self, phase: Phase, plan: PhasePlan, counts: Sequence[int], splits: dict[str, int]) -> Work:
        """Of a worker that folds `counts` items of each part, those of its cluster if that shares them; `splits` of the attention tensors that
        the phase reads."""
        return {"fold": self._fold, "attention": self._attention, "map": self._map}[phase.kind](phase, plan, counts, splits)

    def _read(self, phase: Phase, splits: dict[str, int], share: float = 1.0) -> float:
        total = sum(self._bytes(self.graph.tensors[name], splits.get(name, 1)) for name in phase.reads)
        return max(0.0, total * share - HANDED) / self.profile.l2_rate * 1e6

    def _input(self, phase: Phase, plan: PhasePlan, splits: dict[str, int]) -> float:
        """Of what a prologue reads whole: as its bytes take, or its loads."""
        return max(self._read(phase, splits, 1 / plan.cluster), self._loads(phase, plan, splits) * self.profile.load_us)

    def _loads(self, phase: Phase, plan: PhasePlan, splits: dict[str, int]) -> float:
        """Of one thread while a prologue goes through its vectors: of blocks of columns, in vectors of up to 4 elements; log-sum-exps one by one."""
        k = phase.k or max((self.graph.tensors[name].width for name in phase.reads), default=0)
        width, rows = math.gcd(plan.chunk or k // plan.parts, 64), self.padded_batch * plan.parts
        blocks = k // plan.parts // plan.cluster // width * -(-rows // 8) if k else 0
        vectors = max(1.0, min(8, rows) * width / THREADS / min(4, max(1, min(8, rows) * width // THREADS)))
        tensors = [(self.graph.tensors[name], splits.get(name, 1)) for name in phase.reads]
        return sum(blocks * n * (vectors + (n > 1)) for t, n in tensors if self._dtype(t, n) == "float32")

    def _dtype(self, tensor: Tensor, splits: int) -> str:
        return self.dtypes.get(tensor.name) or narrowest(tensor, splits)

    def _bytes(self, tensor: Tensor, splits: int) -> float:
        """Of a tensor as it crosses, with the log-sum-exps of its splits."""
        each = ITEMSIZE[self._dtype(tensor, splits)] + (ITEMSIZE["float32"] / SHARING if splits > 1 else 0.0)
        return self.batch * tensor.width * splits * each

    def _fold(self, phase: Phase, plan: PhasePlan, counts: Sequence[int], splits: dict[str, int]) -> Work:
        p, unit_bytes = self.profile, 64 * plan.chunk * phase.itemsize
        read = self._input(phase, plan, splits)
        units = phase.k // plan.parts // plan.chunk // plan.cluster
        tiles = [n * len(part.weights) for n, part in zip(counts, phase.parts, strict=True)]
        groups = -(-max(counts) // (plan.group * plan.cluster))
        narrow = max(1.0, p.row_bytes / (plan.chunk * phase.itemsize))
        return Work(
            read=read,
            before=p.stage_us,
            runs=self._runs(phase, plan, groups, sum(tiles) * units, read),
            unit_us=self._unit_us(plan, unit_bytes) + self._store_us(plan) * plan.pieces / units,
            after=p.finish_us
            + self._finish(phase, plan, min(plan.group, -(-max(counts) // plan.cluster)))
            + self._exchange(plan, min(self._group(phase, plan), -(-sum(tiles) // plan.cluster)) * ROWS),
            unit_bytes=unit_bytes,
            streamed_bytes=unit_bytes * narrow,
        )

    def _unit_us(self, plan: PhasePlan, unit_bytes: int) -> float:
        """Of a fold's unit that is there, past the resident's columns."""
        p, further = self.profile, columns(self.padded_batch, plan.parts) - 8
        if plan.instruction == "wgmma":
            return p.unit_us + p.wgmma_wait_us + (p.wgmma_us + p.wgmma_column_us * further) * unit_bytes / UNIT
        return p.unit_us + (p.mma_us + p.column_us * further) * unit_bytes / UNIT

    def _store_us(self, plan: PhasePlan) -> float:
        """What follows a tile's units of one piece: its sums to shared memory, past other pieces' where there are several."""
        return self.profile.store_us * columns(self.padded_batch, plan.parts) * (1 if plan.pieces == 1 else 2)

    def _finish(self, phase: Phase, plan: PhasePlan, tiles: int) -> float:
        """Summing what so many of a worker's tiles have left of each matrix, part and mate, in blocks of up to FRAME values."""
        size = max(1, min(tiles, FRAME // (plan.rows * self.padded_batch)))
        loads = max(len(part.weights) for part in phase.parts) * plan.parts * plan.cluster
        return -(-tiles // size) * loads * max(1.0, size * plan.rows * self.padded_batch / THREADS) * self.profile.value_us

    def _exchange(self, plan: PhasePlan, rows: float) -> float:
        """Until a cluster's workers have each other's sums, of so many mma rows of each sequence from each."""
        if plan.cluster == 1:
            return 0.0
        return self.profile.exchange_us + plan.cluster * rows * self.padded_batch * ITEMSIZE["float32"] / self.profile.exchange_rate * 1e6

    @staticmethod
    def _group(phase: Phase, plan: PhasePlan) -> int:
        """Tiles of a worker that finish together, of every matrix."""
        return plan.group * max(len(part.weights) for part in phase.parts)

    def _runs(self, phase: Phase, plan: PhasePlan, groups: int, units: int, read: float) -> tuple[tuple[float, int], ...]:
        """Groups, and in each the pieces of the resident, which are staged anew for each group."""
        p, out = self.profile, []
        finish = p.group_us + self._finish(phase, plan, plan.group) + self._exchange(plan, self._group(phase, plan) * ROWS)
        for run in range(groups * plan.pieces):
            pause = p.piece_us if run and plan.pieces > 1 else 0.0
            if run and run % plan.pieces == 0:
                pause += finish + (read if plan.pieces > 1 else 0.0)
            out.append((pause, (run + 1) * units // (groups * plan.pieces) - run * units // (groups * plan.pieces)))
        return tuple(out)

    def _attention(self, phase: Phase, plan: PhasePlan, counts: Sequence[int], splits: dict[str, int]) -> Work:
        p, positions = self.profile, min(phase.k, phase.window or phase.k)
        blocks = math.ceil(positions / plan.chunk / (plan.splits * plan.cluster))
        unit_bytes = plan.chunk * phase.head_dim * phase.itemsize  # keys, then values
        exchange = self._exchange(plan, phase.head_dim * columns(1, phase.heads // phase.kv_heads) / self.padded_batch)

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

    def _map(self, phase: Phase, plan: PhasePlan, counts: Sequence[int], splits: dict[str, int]) -> Work:
        p, read = self.profile, self._input(phase, plan, splits)
        return Work(read=read, before=p.map_us, runs=(((sum(counts) - 1) * p.group_us, 0),), unit_us=0.0, after=0.0)
