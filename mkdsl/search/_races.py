"""What must be ordered for every read of a tensor that crosses phases to see the right instance, checked against an `Execution`.

Instances: in the loop that writes it last, its home, a tensor's instance is the iteration; a carried tensor written in iteration i is
instance i + 1, read in iteration i it is instance i, and instance 0 is written before the loop. Instance n lives in slot n % incarnations.

A "counter" tensor holds plain words behind release/acquire counters: a read must happen after the write, through release events alone.

A "data" tensor's words are the sentinel until they are written, and readers look until none is. So a read need not happen after the write,
but it must find the sentinel or this instance, never an older one. Before the launch every slot is filled with the sentinel; afterwards who
writes a row of instance n at home clears the same row of the slot that instance n + 1 will use, which held instance n + 1 - incarnations.
Hence (clear) all reads of that older instance happen before the clear. And (fence) between the clear and anyone else's first look at
instance n + 1 the clearing worker fences and then signals, and that signal happens before the look. Relaxed signals order nothing by
themselves, which is why the fence must come between. A worker sees its own clears without one. A phase looks at what it reads whole after
its waits, but a fold may look at the older rows that its finish adds before them (`Schedule.preloads`).

Both kinds need (reuse): a slot's former readers are done before it is written again. Instance 0 has another writer, and its stores must
not come late either: they are there once they are released, or fenced and signalled, or once someone else who read them whole is done.

Events are counted, iterations together: iteration i's has come at (i + 1) x participants. That is right only if (count) nobody signals an
iteration before all have signalled the one before.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from mkdsl.graph import OpGraph, Phase, Tensor
from mkdsl.search._order import Execution, Step
from mkdsl.search._schedule import PhasePlan, Schedule

BEFORE, CLEAR, FENCE, EARLY, REUSE, COUNT = "before", "clear", "fence", "early", "reuse", "count"


@dataclasses.dataclass(frozen=True, eq=False)
class Violation:
    """`first` of worker `first_worker` should happen before `then` of worker `then_worker`, and need not."""

    kind: str
    tensor: str
    instance: int
    first: Step
    first_worker: int
    then: Step
    then_worker: int

    def __str__(self) -> str:
        t, n, w, v = self.tensor, self.instance, self.first_worker, self.then_worker
        return {
            BEFORE: f"{self.then} reads {t} (instance {n}) on worker {v}, unordered with the write in {self.first} on worker {w}",
            CLEAR: f"{self.then} on worker {v} clears {t}'s slot of instance {n}, which {self.first} may still read on worker {w}",
            FENCE: f"{self.then} may look at {t} (instance {n}) on worker {v} before worker {w}'s clear in {self.first}: no fence",
            EARLY: f"{self.then} may look at {t} (instance {n}) on worker {v} too early, before worker {w}'s clear in {self.first}",
            REUSE: f"{self.then} on worker {v} writes to {t}'s slot of instance {n}, unordered with {self.first} on worker {w}",
            COUNT: f"{self.then} on worker {v} may signal before {self.first} on worker {w}: their event counts both",
        }[self.kind]


def overtakings(execution: Execution) -> Iterator[Violation]:
    """Steps of waited-for phases that may signal before the same phase's former iteration is complete."""
    waited = {name for plan in execution.schedule.phases for name in plan.waits}
    for then in execution.steps:
        if then.phase.name in waited and then.iteration > 0:
            first = execution.at[then.phase.name, then.iteration - 1]
            late = first.index > then.clock[np.ix_(then.workers, first.workers)]
            if late.any():
                v, w = np.argwhere(late)[0]
                yield Violation(COUNT, "", first.iteration, first, int(first.workers[w]), then, int(then.workers[v]))


def home(graph: OpGraph, tensor: str) -> int:
    """The segment whose iterations number a tensor's instances: the last that writes it."""
    return max(p.segment for p in graph.phases if tensor in p.writes)


def written_instance(tensor: Tensor, home: int, step: Step) -> int:
    if step.phase.segment != home:
        return 0
    return step.iteration + tensor.carried


def read_instance(tensor: Tensor, home: int, step: Step, repeats: int) -> int:
    """`repeats`: of the home segment."""
    if step.phase.segment == home:
        return step.iteration
    return repeats if tensor.carried and step.phase.segment > home else 0


def owners(phase: Phase, plan: PhasePlan, part: int, batch: int) -> np.ndarray:
    """[batch, rows]: which worker finishes each row of a part. Of an attention, which may be split: [batch * kv_heads * splits, 1]."""
    counts = [n for _, n in plan.tasks[part]]
    of_item = np.full(sum(counts), -1)
    for worker, (first, n) in enumerate(plan.tasks[part]):
        of_item[first : first + n] = worker
    if phase.kind == "attention":
        return of_item[:, None]
    rows = np.repeat(of_item, plan.rows)
    return rows.reshape(batch, -1) if phase.kind == "map" else np.broadcast_to(rows, (batch, rows.size))


class Accesses:
    """Who reads and writes one tensor when, and whether the order of steps keeps them apart."""

    def __init__(self, execution: Execution, tensor: Tensor) -> None:
        graph, schedule = execution.graph, execution.schedule
        self.execution, self.tensor, self.plan = execution, tensor, schedule.tensor(tensor.name)
        self.schedule: Schedule = schedule
        self.home = home(graph, tensor.name)
        repeats = execution.repeats[self.home]
        self.writes: dict[int, Step] = {}
        self.reads: dict[int, list[Step]] = {}
        for step in execution.steps:
            if tensor.name in step.phase.writes:
                self.writes[written_instance(tensor, self.home, step)] = step
            if tensor.name in step.phase.reads or tensor.name in step.phase.row_reads:
                self.reads.setdefault(read_instance(tensor, self.home, step, repeats), []).append(step)
        self._pairs: dict[tuple[str, str, bool], np.ndarray] = {}

    def pairs(self, reader: Phase, writer: Phase) -> np.ndarray:
        """[worker, worker]: whether the first reads, in `reader`, rows that the second writes in `writer`."""
        whole = self.tensor.name in reader.reads
        return self._pairs_of(reader, writer, whole=whole)

    def looks(self, read: Step, writer: Phase) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """The reads of a step as (kind of violation, pairs, what the reading workers know when they look)."""
        if self.tensor.name in read.phase.reads:
            yield FENCE, self._pairs_of(read.phase, writer, whole=True), read.clock
        if self.tensor.name in read.phase.row_reads:
            kind, clock = (EARLY, read.early) if self.schedule.preloads(read.phase) else (FENCE, read.clock)
            yield kind, self._pairs_of(read.phase, writer, whole=False), clock

    def _pairs_of(self, reader: Phase, writer: Phase, *, whole: bool) -> np.ndarray:
        key = reader.name, writer.name, whole
        if key not in self._pairs:
            self._pairs[key] = self._find_pairs(reader, writer, whole)
        return self._pairs[key]

    def _find_pairs(self, reader: Phase, writer: Phase, whole: bool) -> np.ndarray:
        writing = self._owners(writer)
        met = np.zeros((self.schedule.workers,) * 2, bool)
        part_of_rows = [i for i, part in enumerate(reader.parts) if part.rows == self.tensor.width]
        if whole or not part_of_rows or "attention" in (reader.kind, writer.kind):
            met[np.ix_(self.schedule.plan(reader.name).participants(), np.unique(writing))] = True
        else:
            for part in part_of_rows:
                met[owners(reader, self.schedule.plan(reader.name), part, self.schedule.batch), writing] = True
        return met

    def _owners(self, writer: Phase) -> np.ndarray:
        part = next(i for i, part in enumerate(writer.parts) if self.tensor.name in part.writes)
        return owners(writer, self.schedule.plan(writer.name), part, self.schedule.batch)

    def violations(self) -> Iterator[Violation]:
        """All but missing fences."""
        for n, write in self.writes.items():
            if self.plan.handoff == "counter":
                for read in self.reads.get(n, ()):
                    yield from self._unordered(
                        BEFORE, n, write, read, self.pairs(read.phase, write.phase).T | self._everyone(write, read), read.released
                    )
            yield from self._reused(REUSE, n - self.plan.incarnations, write)
            if self._clears(write):
                yield from self._reused(CLEAR, n + 1 - self.plan.incarnations, write)

    def _reused(self, kind: str, old: int, write: Step) -> Iterator[Violation]:
        """An older instance of a slot that `write` overwrites or clears: its readers are done, and so is another writer."""
        for read in self.reads.get(old, ()):
            yield from self._unordered(kind, old, read, write, self.pairs(read.phase, write.phase), write.clock)
        former = self.writes.get(old, write)
        if self.plan.handoff == "counter" and former.phase != write.phase:
            yield from self._unordered(REUSE, old, former, write, self._stores(former, write), write.released)

    def unfenced(self, fenced_after: np.ndarray) -> Iterator[Violation]:
        """Looks that may come before a clear, clears that may come before instance 0; `fenced_after` as `Execution` gives it."""
        for n, write in self.writes.items():
            if not self._clears(write):
                continue
            old = n + 1 - self.plan.incarnations
            former = self.writes.get(old, write)
            if former.phase != write.phase:
                late = self._stores(former, write) & (fenced_after[former.index][:, None] > write.clock.T)
                if former.phase.kind == "map":  # stores each row once; of a fold's rows that were seen another store may be under way
                    late &= ~self._seen_whole(old, write)
                np.fill_diagonal(late, False)
                yield from self._report(REUSE, old, former, write, late)
            for read in self.reads.get(n + 1, ()):
                for kind, pairs, clock in self.looks(read, write.phase):
                    late = pairs.T & (fenced_after[write.index][:, None] > clock.T)
                    np.fill_diagonal(late, False)
                    yield from self._report(kind, n + 1, write, read, late)

    def _seen_whole(self, instance: int, then: Step) -> np.ndarray:
        """[writer, worker]: whether a worker knows, in step `then`, that someone but the writer is done who read the whole of an instance.
        The writer itself may have seen its stores before others can."""
        seen = np.zeros((self.schedule.workers,) * 2, bool)
        for read in self.reads.get(instance, ()):
            if self.tensor.name in read.phase.reads and read.phase.kind != "attention":  # which reads its own heads only
                known = np.zeros_like(seen)
                known[:, read.workers] = then.clock[:, read.workers] >= read.index
                seen |= known.sum(axis=1) > known.T  # more than the writer's own read
        return seen

    def _clears(self, write: Step) -> bool:
        return self.plan.handoff == "data" and self.plan.incarnations > 1 and write.phase.segment == self.home

    def _everyone(self, first: Step, then: Step) -> np.ndarray:
        met = np.zeros((self.schedule.workers,) * 2, bool)
        met[np.ix_(first.workers, then.workers)] = True
        return met

    def _stores(self, first: Step, then: Step) -> np.ndarray:
        """[worker, worker]: both store to this tensor."""
        met = np.zeros((self.schedule.workers,) * 2, bool)
        met[np.ix_(np.unique(self._owners(first.phase)), np.unique(self._owners(then.phase)))] = True
        return met

    def _unordered(self, kind: str, instance: int, first: Step, then: Step, met: np.ndarray, clock: np.ndarray) -> Iterator[Violation]:
        """met[w, v]: `first` on worker w concerns `then` on worker v. Program order counts across steps only: within a step a worker
        may finish rows in overlapping blocks, and so read again what it has just overwritten."""
        late = met & (first.index > clock.T)
        if first.index < then.index:
            np.fill_diagonal(late, False)
        yield from self._report(kind, instance, first, then, late)

    def _report(self, kind: str, instance: int, first: Step, then: Step, late: np.ndarray) -> Iterator[Violation]:
        if late.any():
            w, v = (int(i) for i in np.argwhere(late)[0])
            yield Violation(kind, self.tensor.name, instance, first, w, then, v)
