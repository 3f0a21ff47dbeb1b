"""Items -> workers: who folds which tiles. Everything here is deterministic."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mkdsl.graph import AttentionPhase, FoldPhase, OpGraph, Phase
from mkdsl.schedule import AttentionPlan, FoldPlan, PhasePlan, Range, Tasks


def weights(phase: Phase) -> tuple[int, ...]:
    """What an item of each part streams, relative to the phase's other parts."""
    return tuple(max(1, len(part.weights)) for part in phase.parts)


def shares(counts: Sequence[int], costs: Sequence[int], workers: int) -> tuple[int, ...]:
    """How many workers each part gets, so that the busiest worker has as little as possible.

    Args:
      counts: items of each part.
      costs: of one item of each part.
      workers: there are. If there are fewer than parts, every part gets them all.
    """
    if len(counts) > workers:
        return tuple(min(n, workers) for n in counts)
    low, high = max(costs), sum(n * c for n, c in zip(counts, costs, strict=True))
    while low < high:  # the least load for which the workers suffice
        load = (low + high) // 2
        low, high = (low, load) if sum(_needed(counts, costs, load)) <= workers else (load + 1, high)
    given = _needed(counts, costs, low)
    for _ in range(min(workers, sum(counts)) - sum(given)):  # those left over go where the mean load is highest
        hungry = [i for i in range(len(given)) if given[i] < counts[i]]
        given[max(hungry, key=lambda i: counts[i] * costs[i] / given[i])] += 1
    return tuple(given)


def _needed(counts: Sequence[int], costs: Sequence[int], load: int) -> list[int]:
    return [-(-n // (load // c)) for n, c in zip(counts, costs, strict=True)]


@dataclasses.dataclass
class Assigner:
    """Spreads one segment's phases over the workers. `load` is the stream each worker has so far: later phases even it out."""

    workers: int

    def __post_init__(self) -> None:
        self.load = np.zeros(self.workers, np.int64)

    def assign(self, phase: Phase, plan: PhasePlan, batch: int) -> Tasks:
        """Each part's items over a contiguous share of the workers, counts differing by at most one."""
        counts, costs = plan.items(phase, batch), weights(phase)
        given = shares(counts, costs, self.workers)
        if sum(given) > self.workers:  # fewer workers than parts
            chosen = [self._least(n, plan.cluster) for n in given]
        elif len(given) == 1:
            chosen = [self._least(given[0], plan.cluster)]
        else:
            chosen = self._contiguous(counts, costs, given)
        bytes_per_cost = self._item_bytes(phase, plan)
        tasks = []
        for n, cost, who in zip(counts, costs, chosen, strict=True):
            per_worker = self._counts(n, who, plan.cluster)
            self.load += self._streamed(per_worker * cost * bytes_per_cost, plan.cluster)
            tasks.append(_ranges(per_worker))
        return tuple(tasks)

    @staticmethod
    def _item_bytes(phase: Phase, plan: PhasePlan) -> int:
        """What an item streams for each of its weights."""
        if isinstance(phase, AttentionPhase) and isinstance(plan, AttentionPlan):
            return -(-phase.context // plan.splits) * phase.head_dim * 2 * phase.itemsize
        if isinstance(phase, FoldPhase) and isinstance(plan, FoldPlan):
            return plan.rows * phase.k * phase.itemsize
        return 1

    def _least(self, n: int, cluster: int) -> np.ndarray:
        """The n workers with the least to stream so far; of clusters that share items one worker each, as far as they go."""
        rank = np.arange(self.workers) % cluster
        return np.sort(np.lexsort((self._streamed(self.load, cluster), rank))[:n])

    def _counts(self, n: int, who: np.ndarray, cluster: int) -> np.ndarray:
        """Items of each worker; those with the least to stream so far take one more, of a cluster that shares its items one after the other."""
        per_worker = np.zeros(self.workers, np.int64)
        per_worker[who] = n // len(who)
        per_worker[who[np.lexsort((who % cluster, self.load[who]))[: n % len(who)]]] += 1
        return per_worker

    @staticmethod
    def _streamed(own: np.ndarray, cluster: int) -> np.ndarray:
        """What each worker streams of what all own: in a cluster that shares it, the mean."""
        return np.repeat(own.reshape(-1, cluster).sum(axis=1) // cluster, cluster)

    def _contiguous(self, counts: Sequence[int], costs: Sequence[int], given: Sequence[int]) -> list[np.ndarray]:
        """The parts' shares next to each other, started where the sum evens out best."""
        mean = np.zeros(self.workers)
        ends = np.cumsum((0, *given))
        for i, (n, cost) in enumerate(zip(counts, costs, strict=True)):
            mean[ends[i] : ends[i + 1]] = n * cost / given[i]
        scale = mean.sum() / max(1, self.load.sum())  # both as shares of one phase: the choice does not depend on units
        starts = [float(np.dot(self.load * scale, np.roll(mean, r))) for r in range(self.workers)]
        start = int(np.argmin(np.round(starts, 6)))
        return [(np.arange(ends[i], ends[i + 1]) + start) % self.workers for i in range(len(given))]


def _ranges(counts: np.ndarray) -> tuple[Range, ...]:
    firsts = np.cumsum(counts) - counts
    return tuple((int(f), int(n)) for f, n in zip(firsts, counts, strict=True))


def assign_all(graph: OpGraph, plans: Sequence[PhasePlan], *, batch: int, workers: int) -> tuple[PhasePlan, ...]:
    """The plans with their tasks, segment by segment."""
    by_name = {plan.name: plan for plan in plans}
    out = []
    for segment in graph.segments:
        assigner = Assigner(workers)
        for name in segment.phases:
            plan = by_name[name]
            out.append(dataclasses.replace(plan, tasks=assigner.assign(graph.phase(name), plan, batch)))
    return tuple(out)
