"""Worker classes. Two workers are of one class if, in every phase, they have items of the same parts and take part or not alike.

All workers of a class signal and wait for the same events. So they know the same about others, and others know the same about them; only about
itself does a worker know more. What is proven for one worker of each class is proven for all, at a cost that does not grow with the number of
workers: a model that keeps all workers busy has a handful of classes.
"""

import dataclasses

import numpy as np

from mkdsl.graph import OpGraph
from mkdsl.schedule import PhasePlan, Schedule


@dataclasses.dataclass(frozen=True, eq=False)
class VectorClock:
    """What a worker of each class knows. others[c, d]: a worker of class c knows that any other worker of class d is done with the steps up to
    this one. own[c]: the last step that it is done with itself. -1 is no step."""

    others: np.ndarray
    own: np.ndarray

    def joined(self, who: np.ndarray, events: list[np.ndarray]) -> "VectorClock":
        """The clock after the classes in `who` have waited for these events."""
        if not events:
            return self
        others = self.others.copy()
        others[who] = np.maximum(others[who], np.maximum.reduce(events))
        return VectorClock(others, self.own)

    def event(self, who: np.ndarray, index: int) -> np.ndarray:
        """[class]: what a worker knows once it has seen the signals of all of `who` in step `index`."""
        out = self.others[who].max(axis=0)
        out[who] = index
        return out


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of workers whose accesses concern each other, one for each pair of classes.

    first[c, d] and then[c, d] are two different workers, one of class c and one of class d; -1 if the accesses of no two such workers meet.
    own[c] is a worker of class c whose two accesses meet; -1 if there is none.
    """

    first: np.ndarray
    then: np.ndarray
    own: np.ndarray

    @property
    def T(self) -> "Pairs":
        return Pairs(self.then.T, self.first.T, self.own)

    def without(self, met: np.ndarray) -> "Pairs":
        return Pairs(np.where(met, -1, self.first), self.then, self.own)

    def late(self, index: int | np.ndarray, clock: VectorClock, *, own: bool = False) -> tuple[int, int] | None:
        """A pair in which the second worker does not know, by its clock, that the first is done with step `index`; None if there is none.

        index: of a step, or one for each class of the first worker. own: look at workers that meet themselves too, although program order says
        that they are done with earlier steps.
        """
        index = np.broadcast_to(index, self.own.shape)
        late = np.argwhere((self.first >= 0) & (index[:, None] > clock.others.T))
        if len(late):
            c, d = late[0]
            return int(self.first[c, d]), int(self.then[c, d])
        alone = self.own[(self.own >= 0) & (index > clock.own) & own]
        return (int(alone[0]), int(alone[0])) if len(alone) else None


class WorkerClasses:
    """The classes of a schedule's workers.

    of[worker]: its class. size[class]: how many workers it has. lead, second[class]: its first two workers, -1 if there is no second.
    takes[phase]: [part, class], whether the class has items. who[phase]: [class], whether it takes part, itself or for a peer.
    """

    def __init__(self, graph: OpGraph, schedule: Schedule) -> None:
        busy = {p.name: np.array([[n > 0 for _, n in part] for part in schedule.plan(p.name).tasks]) for p in graph.phases}
        there = {p.name: np.isin(np.arange(schedule.workers), schedule.plan(p.name).participants) for p in graph.phases}
        self.of = _numbered(np.concatenate([*busy.values(), [*there.values()]]))
        self.size = np.bincount(self.of)
        members = np.argsort(self.of, kind="stable")  # all workers, class after class
        at = np.cumsum(self.size) - self.size  # where each class begins
        self.lead = members[at]
        self.second = np.where(self.size > 1, members[np.minimum(at + 1, len(members) - 1)], -1)
        self.takes = {name: parts[:, self.lead] for name, parts in busy.items()}
        self.who = {name: workers[self.lead] for name, workers in there.items()}

    def all_pairs(self, first: np.ndarray, then: np.ndarray) -> Pairs:
        """Everyone of the classes `first` meets everyone of `then`."""
        met = first[:, None] & then
        np.fill_diagonal(met, met.diagonal() & (self.size > 1))
        there = np.broadcast_to(self.lead, met.shape).copy()
        np.fill_diagonal(there, self.second)
        return Pairs(np.where(met, self.lead[:, None], -1), np.where(met, there, -1), np.where(first & then, self.lead, -1))

    def peers(self, plan: PhasePlan) -> Pairs:
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


def _numbered(columns: np.ndarray) -> np.ndarray:
    """[column]: a number for each column, the same for equal ones, in the order in which they first come."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(column.tobytes(), len(seen)) for column in np.ascontiguousarray(columns.T)])
