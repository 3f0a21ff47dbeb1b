"""Hardware as data: what the search knows of a GPU. No code asks which GPU it is."""

import dataclasses
import itertools
from typing import Any

from mkdsl.schedule._json import parse

KIB = 1024

Curve = tuple[tuple[float, float], ...]  # (x, y) points, x ascending


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """One GPU. Times in microseconds, sizes in bytes unless a name says KiB.

    Attributes:
      name: as `profile` finds it, lower case.
      capability: CUDA compute capability (public).
      workers: streaming multiprocessors; one resident CTA each (public).
      clusters: (CTAs of a thread-block cluster, SMs that such clusters leave idle, fraction of `bandwidth` they reach). All of them must be
        resident at once. Pairs always are: SMs come in pairs. How many fours are depends on which SMs of a card are fused off, so that the
        built-in profiles have none; of the H200s measured, (4, 12, 0.94).
      smem_bytes: most shared memory of one CTA (public).
      bandwidth: bytes/s that all workers together read from device memory (H200: measured ceiling).
      stream: (KiB in flight per worker, fraction of `bandwidth` reached) (H200: measured).
      l2_rate: bytes/s that one worker reads of activations from L2 under the stream (H200: kernels' timelines give 18 to 25 GB/s,
        where all workers read the same; the probe, with less to read, 94). load_us: what a thread's loads take one by one, where they are
        so short that this is more (fitted).
      clock_hz: boost clock (public); only used to scale what is assumed for other GPUs.
      handoff: (KiB in flight per worker, us) from the last worker's store to a reader's data, relaxed (H200: measured).
      released: the same behind a release/acquire counter (H200: measured).
      issue_us: from a unit's landing to the issue of the one that waits for it (H200: 1 unit in flight against 2).
      unit_us: a unit's barriers and loop; mma_us: 32 KiB past 8 columns, shared memory to accumulators; column_us: for every further
        column; wgmma_us, wgmma_column_us: the same by `wgmma`, which a unit waits for, wgmma_wait_us; store_us: a tile's sums of a column
        to shared memory, twice that where they are added to what is there (fitted: H200, to 24 kernels' times, docs/measurements.md, where
        benchmarks/units.py has them by themselves).
      row_bytes: a box row shorter than this is bound by TMA's issue rate: 128-byte rows run 40 % slower (H200: measured).
      prologue_us: from a fold's data to its first mma; epilogue_us: from its last unit to the signal, the last mma's latency included;
        next_epilogue_us: one more epilogue; value_us: in an epilogue, one value of a thread from one piece of K, matrix and worker of a cluster
        (fitted).
      exchange_us: from a cluster's last sum to the others' shared memory (H200: an all-gather of 512 bytes each takes 0.5, measured alone;
        in kernels, where folding goes on meanwhile, less shows); exchange_rate: bytes/s that one receives there (fitted).
      k_stage_us: one more K stage of a resident, staged while compute waits for L2 (fitted).
      attention_us: an attention item's short dependent steps (H200: fitted to the prototype's table); block_us: one more cache block, besides
        its bytes (H200: 4 splits against 2 of one model).
      map_us: latency of a map, one item (assumed: a fold's without its mma).
      drift: memory serves some workers faster and some slower by this fraction; the cost model counts at most drift_us a phase (timeline).
      measured: in a profile that `mkdsl probe` wrote, the fields that it measured; the others are taken over from a built-in profile.
    """

    name: str
    capability: tuple[int, int]
    workers: int
    clusters: tuple[tuple[int, int, float], ...]
    smem_bytes: int
    bandwidth: float
    stream: Curve
    l2_rate: float
    load_us: float
    clock_hz: float
    handoff: Curve
    released: Curve
    issue_us: float
    unit_us: float
    mma_us: float
    column_us: float
    wgmma_us: float
    wgmma_column_us: float
    wgmma_wait_us: float
    store_us: float
    row_bytes: int
    prologue_us: float
    epilogue_us: float
    next_epilogue_us: float
    value_us: float
    exchange_us: float
    exchange_rate: float
    k_stage_us: float
    attention_us: float
    block_us: float
    map_us: float
    drift: float
    drift_us: float
    measured: tuple[str, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of clusters, 1 included, of which a launch holds as many workers as there are."""
        return (1, *(size for size, _, reached in self.clusters if self.held(size) == self.workers and reached == 1))

    def held(self, cluster: int) -> int:
        """Workers that clusters of a size hold; 0 if there are none such, as before Hopper."""
        idle = {1: 0} | {size: idle for size, idle, _ in self.clusters if self.capability >= (9, 0)}
        return max(0, self.workers - idle.get(cluster, self.workers)) // cluster * cluster

    def launched(self, cluster: int) -> "Profile":
        """The GPU as a launch in clusters of a size sees it: with the workers and the bandwidth that those have.

        Raises:
          ValueError: it holds no such clusters.
        """
        if cluster == 1:
            return self
        if not self.held(cluster):
            raise ValueError(f"{self.name} holds no clusters of {cluster}: {self.clusters=} {self.workers=}")
        reached = next(reached for size, _, reached in self.clusters if size == cluster)
        return dataclasses.replace(self, workers=self.held(cluster), bandwidth=self.bandwidth * reached, clusters=((cluster, 0, 1.0),))

    @property
    def launches(self) -> tuple["Profile", ...]:
        """All that is worth a search: clusters of each size, and none unless one size leaves nothing idle."""
        found = [self.launched(size) for size, *_ in self.clusters if self.held(size)]
        return (*([] if len(self.sizes) > 1 else [dataclasses.replace(self, clusters=())]), *found)

    @property
    def tma(self) -> bool:
        """Whether it has a tensor memory accelerator; without one, threads copy (`cp.async`)."""
        return self.capability >= (9, 0)

    @property
    def instructions(self) -> tuple[str, ...]:
        """What a warpgroup's tensor cores can be told: `wgmma`, which reads both operands from shared memory, by Hopper's only."""
        return ("mma", "wgmma") if self.capability[0] == 9 else ("mma",)

    def worker_rate(self, in_flight: float) -> float:
        """Bytes per microsecond that one worker fetches from device memory if all of them keep so many bytes in flight."""
        return self.bandwidth * interpolate(self.stream, in_flight / KIB) / self.workers * 1e-6

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any, what: str = "profile") -> "Profile":
        """What `to_json` returned, also after a way through JSON text.

        Raises:
          ValueError: it is no profile; the message says `what` it is and names the field.
        """
        found = parse(cls, data, what)
        for name in ("workers", "smem_bytes", "bandwidth", "l2_rate", "exchange_rate", "clock_hz"):
            if not getattr(found, name):
                raise ValueError(f"{what}: {name} is 0")
        sizes = [size for size, *_ in found.clusters]
        if len({*sizes}) < len(sizes) or any(not 2 <= size <= 8 or not 0 < reached <= 1 for size, _, reached in found.clusters):
            raise ValueError(
                f"{what}: clusters are (2 to 8 CTAs, idle SMs, fraction of bandwidth), each size once, not {found.clusters!r:.80}"
            )
        for name in ("stream", "handoff", "released"):
            _check_curve(getattr(found, name), f"{what}: {name}")
        return found


def _check_curve(curve: Curve, where: str) -> None:
    if not curve or any(y <= 0 for _, y in curve) or any(x0 >= x1 for (x0, _), (x1, _) in itertools.pairwise(curve)):
        raise ValueError(f"{where}: (x, y) points with ascending x and y above 0 are needed, not {curve!r:.80}")


def interpolate(curve: Curve, x: float) -> float:
    """Piecewise linear through the points, constant beyond them."""
    if x <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return curve[-1][1]
