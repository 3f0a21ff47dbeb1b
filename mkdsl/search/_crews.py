"""Crews: workers that have items of the same parts of all phases, and take part in the same. They signal and wait for the same events, so they
know the same, and the same is known of them; only of itself does a worker know more. What is proven of crews is proven of all their workers, at
a cost that does not grow with how many they are."""

import dataclasses

import numpy as np

from mkdsl.graph import OpGraph
from mkdsl.search._schedule import PhasePlan, Schedule


@dataclasses.dataclass(frozen=True, eq=False)
class Clock:
    """What each crew's workers know: others[c, d], up to which step a worker of crew c knows any other of crew d to be done; own[c], up to
    which step it is done itself. -1 is nothing."""

    others: np.ndarray
    own: np.ndarray

    def joined(self, who: np.ndarray, events: list[np.ndarray]) -> "Clock":
        """The same after the crews in `who` have waited for these events."""
        if not events:
            return self
        others = self.others.copy()
        others[who] = np.maximum(others[who], np.maximum.reduce(events))
        return Clock(others, self.own)

    def event(self, who: np.ndarray, index: int) -> np.ndarray:
        """[crew]: what one knows for whom all of `who` have signalled in step `index`."""
        out = self.others[who].max(axis=0)
        out[who] = index
        return out


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Workers whose accesses concern each other. Of crews c and d one pair of different workers that do, first[c, d] and then[c, d], -1 if
    there is none; of a crew one worker that meets itself, own[c], or -1."""

    first: np.ndarray
    then: np.ndarray
    own: np.ndarray

    @property
    def T(self) -> "Pairs":
        return Pairs(self.then.T, self.first.T, self.own)

    def without(self, met: np.ndarray) -> "Pairs":
        return Pairs(np.where(met, -1, self.first), self.then, self.own)

    def late(self, index: int | np.ndarray, clock: Clock, *, own: bool = False) -> tuple[int, int] | None:
        """A pair whose second worker, by its clock, does not know its first to be done with step `index`, which may depend on the first's
        crew. own: whether a worker may be late for itself, program order notwithstanding."""
        index = np.broadcast_to(index, self.own.shape)
        late = np.argwhere((self.first >= 0) & (index[:, None] > clock.others.T))
        if len(late):
            c, d = late[0]
            return int(self.first[c, d]), int(self.then[c, d])
        alone = self.own[(self.own >= 0) & (index > clock.own) & own]
        return (int(alone[0]), int(alone[0])) if len(alone) else None


class Crews:
    """The crews of a schedule. of[worker]: its crew; size[crew]; takes[phase]: [part, crew], whether its workers have items; who[phase]:
    [crew], whether they take part."""

    def __init__(self, graph: OpGraph, schedule: Schedule) -> None:
        busy = {p.name: np.array([[n > 0 for _, n in part] for part in schedule.plan(p.name).tasks]) for p in graph.phases}
        there = {p.name: np.isin(np.arange(schedule.workers), schedule.plan(p.name).participants) for p in graph.phases}
        seen: dict[bytes, int] = {}
        columns = np.ascontiguousarray(np.concatenate([*busy.values(), [*there.values()]]).T)
        self.of = np.array([seen.setdefault(column.tobytes(), len(seen)) for column in columns])
        self.size = np.bincount(self.of)
        members = np.argsort(self.of, kind="stable")
        at = np.cumsum(self.size) - self.size
        self.lead = members[at]
        self.second = np.where(self.size > 1, members[np.minimum(at + 1, len(members) - 1)], -1)
        self.takes = {name: parts[:, self.lead] for name, parts in busy.items()}
        self.who = {name: workers[self.lead] for name, workers in there.items()}

    def all_pairs(self, first: np.ndarray, then: np.ndarray) -> Pairs:
        """Everyone of the crews `first` meets everyone of `then`."""
        met = first[:, None] & then
        np.fill_diagonal(met, met.diagonal() & (self.size > 1))
        there = np.broadcast_to(self.lead, met.shape).copy()
        np.fill_diagonal(there, self.second)
        return Pairs(np.where(met, self.lead[:, None], -1), np.where(met, there, -1), np.where(first & then, self.lead, -1))

    def mates(self, plan: PhasePlan) -> Pairs:
        """Everyone who takes part in a phase meets all others of its cluster."""
        there = np.array(plan.participants) if plan.cluster > 1 else np.empty(0, int)
        others = [there - there % plan.cluster + (there + turn) % plan.cluster for turn in range(1, plan.cluster)]
        return self.row_pairs(np.tile(there, len(others)), np.concatenate([there[:0], *others]))

    def row_pairs(self, first: np.ndarray, then: np.ndarray) -> Pairs:
        """Worker first[i] meets worker then[i]."""
        n, own = len(self.size), np.full(len(self.size), -1)
        alone = first[first == then]
        own[self.of[alone]] = alone
        first, then = first[first != then], then[first != then]
        which = np.full((n, n), -1)
        which[self.of[first], self.of[then]] = np.arange(len(first))
        there = [np.where(which >= 0, np.append(workers, -1)[which], -1) for workers in (first, then)]
        return Pairs(there[0], there[1], own)
