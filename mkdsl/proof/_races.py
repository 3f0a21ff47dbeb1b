"""What must be ordered for every read of a tensor that crosses phases to see the right instance, checked against an `Execution`.

Instances: in the loop that writes it last, its home, a tensor's instance is the iteration; a carried tensor written in iteration i is
instance i + 1, read in iteration i it is instance i, and instance 0 is written before the loop. Instance n lives in slot n % incarnations.

A release-acquire tensor holds plain words behind counters: a read must happen after the write, through release events alone.

The words of a sentinel tensor are the sentinel until they are written, and readers look until none is. So a read need not happen after the write,
but it must find the sentinel or this instance, never an older one. Before the launch every slot is filled with the sentinel; afterwards who
writes a row of instance n at home clears the same row of the slot that instance n + 1 will use, which held instance n + 1 - incarnations.
Hence (clear) all reads of that older instance happen before the clear. And (fence) between the clear and anyone else's first look at
instance n + 1 the clearing worker fences and then signals, and that signal happens before the look. Relaxed signals order nothing by
themselves, which is why the fence must come between. A worker sees its own clears without one. A phase looks at what it reads whole after
its waits, but a fold may look at the older rows that its epilogue adds before them (`Schedule.preloads`).

Both kinds need (reuse): a slot's former readers are done before it is written again. Instance 0 has another writer, and its stores must
not come late either: they are there once they are released, or fenced and signalled, or once someone else who read them whole is done.

Clusters (exchange): workers that fold each other's tiles write sums to each other's shared memory, where phases before had buffers of their own.
So whoever enters such a phase must know that the others of its cluster are done with all former ones.

Events are counted, iterations together: iteration i's has come at (i + 1) x participants. That is right only if (count) nobody signals an
iteration before all have signalled the one before.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from mkdsl.graph import AttentionPhase, MapPhase, Phase, Tensor
from mkdsl.proof._classes import Pairs, VectorClock
from mkdsl.proof._errors import Rule
from mkdsl.proof._order import Execution, Step
from mkdsl.schedule import AttentionPlan, FoldPlan, MapPlan, PhasePlan, clears, home, read_instance, written_instance


@dataclasses.dataclass(frozen=True, eq=False)
class Violation:
    """`first` of worker `first_worker` should happen before `then` of worker `then_worker`, and need not."""

    rule: Rule
    tensor: str
    instance: int
    first: Step
    first_worker: int
    then: Step
    then_worker: int

    def __str__(self) -> str:
        t, n, w, v = self.tensor, self.instance, self.first_worker, self.then_worker
        return {
            Rule.BEFORE: f"{self.then} reads {t} (instance {n}) on worker {v}, unordered with the write in {self.first} on worker {w}",
            Rule.CLEAR: f"{self.then} on worker {v} clears {t}'s slot of instance {n}, which {self.first} may still read on worker {w}",
            Rule.FENCE: f"{self.then} may look at {t} (instance {n}) on worker {v} before worker {w}'s clear in {self.first}: no fence",
            Rule.EARLY: f"{self.then} may look at {t} (instance {n}) on worker {v} too early, before worker {w}'s clear in {self.first}",
            Rule.REUSE: f"{self.then} on worker {v} writes to {t}'s slot of instance {n}, unordered with {self.first} on worker {w}",
            Rule.EXCHANGE: f"{self.then} on worker {v} may write to shared memory that worker {w} of its cluster still uses in {self.first}",
            Rule.COUNT: f"{self.then} on worker {v} may signal before {self.first} on worker {w}: their event counts both",
        }[self.rule]


def overtakings(execution: Execution) -> Iterator[Violation]:
    """Steps of waited-for phases that may signal before the same phase's former iteration is complete."""
    for name in {name: None for plan in execution.schedule.phases for name in plan.waits}:
        for first, then in itertools.pairwise(execution.of[name]):
            late = execution.classes.all_pairs(first.who, then.who).late(first.index, then.clock)
            if late:
                yield Violation(Rule.COUNT, "", first.iteration, first, late[0], then, late[1])


def exchanges(execution: Execution) -> Iterator[Violation]:
    """Steps in which a cluster's workers write to each other's shared memory, and former steps in which that may still be in use."""
    last = np.full(len(execution.classes.size), -1)  # step of each class
    for step in execution.steps:
        pairs = execution.classes.peers(execution.schedule.plan(step.phase.name))
        late = pairs.late(last, step.clock)
        if late:
            owner, sender = late
            yield Violation(Rule.EXCHANGE, "", step.iteration, execution.steps[last[execution.classes.of[owner]]], owner, step, sender)
        last[step.who] = step.index


def owners(plan: PhasePlan, part: int, batch: int) -> np.ndarray:
    """[batch, rows]: which worker writes each row of a part. Of an attention, which may be split: [batch * kv_heads * splits, 1]."""
    firsts, counts = np.array(plan.tasks[part]).T
    order = np.argsort(firsts)
    of_item = np.repeat(order, counts[order])
    if isinstance(plan, AttentionPlan):
        return of_item[:, None]
    assert isinstance(plan, FoldPlan | MapPlan)
    rows = np.repeat(of_item, plan.rows)
    return rows.reshape(batch, -1) if isinstance(plan, MapPlan) else np.broadcast_to(rows, (batch, rows.size))


class Accesses:
    """Who reads and writes one tensor when, and whether the order of steps keeps them apart."""

    def __init__(self, execution: Execution, tensor: Tensor) -> None:
        graph, schedule = execution.graph, execution.schedule
        self.execution, self.tensor, self.plan = execution, tensor, schedule.tensor(tensor.name)
        self.classes, self.schedule = execution.classes, schedule
        repeats = execution.repeats[home(graph, tensor.name)]
        self.writes: dict[int, Step] = {}
        self.reads: dict[int, list[Step]] = {}
        for step in (s for p in graph.writers[tensor.name] for s in execution.of[p.name]):
            self.writes[written_instance(graph, tensor.name, step.phase, step.iteration)] = step
        for step in (s for p in graph.readers[tensor.name] for s in execution.of[p.name]):
            instance = read_instance(graph, tensor.name, step.phase, step.iteration, repeats=repeats)
            self.reads.setdefault(instance, []).append(step)
        self._pairs: dict[tuple[str, str, bool], Pairs] = {}

    def looks(self, read: Step, writer: Phase) -> Iterator[tuple[Rule, Pairs, VectorClock]]:
        """The reads of a step as (rule, (writer, reader) pairs, what the reading workers know when they look)."""
        if self.tensor.name in read.phase.reads:
            yield Rule.FENCE, self._met(read.phase, writer, whole=True).T, read.clock
        if self.tensor.name in read.phase.row_reads:
            rule, clock = (Rule.EARLY, read.early) if self.schedule.preloads(read.phase) else (Rule.FENCE, read.clock)
            yield rule, self._met(read.phase, writer, whole=False).T, clock

    def _met(self, reader: Phase, writer: Phase, *, whole: bool) -> Pairs:
        """(worker, worker): the first reads, in `reader`, rows that the second writes in `writer`. whole: all rows."""
        key = reader.name, writer.name, whole
        if key not in self._pairs:
            self._pairs[key] = self._find_pairs(reader, writer, whole)
        return self._pairs[key]

    def _find_pairs(self, reader: Phase, writer: Phase, whole: bool) -> Pairs:
        parts = [i for i, part in enumerate(reader.parts) if part.rows == self.tensor.width]
        if whole or not parts or isinstance(writer, AttentionPhase):
            return self.classes.all_pairs(self.classes.who[reader.name], self._storing(writer))
        reading, writing, batch = self.schedule.plan(reader.name), self.schedule.plan(writer.name), self.schedule.batch
        stored = owners(writing, self._part(writer), batch)
        read = [owners(reading, part, batch) for part in parts]
        return self.classes.row_pairs(*(np.concatenate(rows, axis=None) for rows in (read, [stored] * len(parts))))

    def _part(self, writer: Phase) -> int:
        return next(i for i, part in enumerate(writer.parts) if self.tensor.name in part.writes)

    def _storing(self, writer: Phase) -> np.ndarray:
        """The classes that store to this tensor."""
        return self.classes.takes[writer.name][self._part(writer)]

    def violations(self) -> Iterator[Violation]:
        """All but missing fences."""
        for n, write in self.writes.items():
            if self.plan.handoff.releases:
                for read in self.reads.get(n, ()):
                    pairs = self._met(read.phase, write.phase, whole=True).T
                    yield from self._unordered(Rule.BEFORE, n, write, read, pairs, read.released)
            yield from self._reused(Rule.REUSE, n - self.plan.incarnations, write)
            if self._clears(write):
                yield from self._reused(Rule.CLEAR, n + 1 - self.plan.incarnations, write)

    def _reused(self, rule: Rule, old: int, write: Step) -> Iterator[Violation]:
        """An older instance of a slot that `write` overwrites or clears: its readers are done, and so is another writer."""
        for read in self.reads.get(old, ()):
            whole = self.tensor.name in read.phase.reads
            yield from self._unordered(rule, old, read, write, self._met(read.phase, write.phase, whole=whole), write.clock)
        former = self.writes.get(old, write)
        if self.plan.handoff.releases and former.phase != write.phase:
            yield from self._unordered(Rule.REUSE, old, former, write, self._stores(former, write), write.released)

    def unfenced(self, fenced_after: np.ndarray) -> Iterator[Violation]:
        """Looks that may come before a clear, clears that may come before instance 0; `fenced_after` as `Execution` gives it."""
        for n, write in self.writes.items():
            if not self._clears(write):
                continue
            old = n + 1 - self.plan.incarnations
            former = self.writes.get(old, write)
            if former.phase != write.phase:
                pairs = self._stores(former, write)
                if isinstance(former.phase, MapPhase):  # stores each row once; of a fold's seen rows another store may be under way
                    pairs = pairs.without(self._seen_whole(old, write))
                yield from self._report(Rule.REUSE, old, former, write, pairs.late(fenced_after[former.index], write.clock))
            for read in self.reads.get(n + 1, ()):
                for rule, pairs, clock in self.looks(read, write.phase):
                    yield from self._report(rule, n + 1, write, read, pairs.late(fenced_after[write.index], clock))

    def _seen_whole(self, instance: int, then: Step) -> np.ndarray:
        """[class of the writer, class]: whether a worker knows, in step `then`, that someone but the writer is done who read the whole of an
        instance. The writer itself may have seen its stores before others can."""
        seen = np.zeros((len(self.classes.size),) * 2, bool)
        for read in self.reads.get(instance, ()):
            alone = self.schedule.plan(read.phase.name).cluster == 1  # of a cluster each reads its columns only, and attention its heads
            if self.tensor.name in read.phase.reads and not isinstance(read.phase, AttentionPhase) and alone:
                known = read.who & (then.clock.others >= read.index)
                own = read.who & (then.clock.own >= read.index)
                readers = known @ self.classes.size - known.diagonal() + own
                seen |= (readers[:, None] > known).T  # more than the writer's own read
        return seen

    def _clears(self, write: Step) -> bool:
        return clears(self.execution.graph, self.schedule, self.tensor.name, write.phase)

    def _stores(self, first: Step, then: Step) -> Pairs:
        """(worker, worker): both store to this tensor."""
        return self.classes.all_pairs(self._storing(first.phase), self._storing(then.phase))

    def _unordered(self, rule: Rule, instance: int, first: Step, then: Step, pairs: Pairs, clock: VectorClock) -> Iterator[Violation]:
        """`first` on one worker of a pair concerns `then` on the other. Program order counts across steps only: within a step a worker
        may write rows in overlapping blocks, and so read again what it has just overwritten."""
        yield from self._report(rule, instance, first, then, pairs.late(first.index, clock, own=first.index >= then.index))

    def _report(self, rule: Rule, instance: int, first: Step, then: Step, late: tuple[int, int] | None) -> Iterator[Violation]:
        if late:
            yield Violation(rule, self.tensor.name, instance, first, late[0], then, late[1])
