"""A schedule as explicit programs: for each worker the operations of its compute role, in order, and those of its loader.

This is the protocol that `mkdsl.lower` emits, written down a second time and without looking at the proof. A `Program` is plain data, so
that tests may also break the protocol itself: signal early, clear late, free a stage that is still read.
"""

import dataclasses
import math

from mkdsl.graph import OpGraph, Phase
from mkdsl.schedule import PhasePlan, Schedule

SENTINEL = -1  # no instance


class Miscompute(Exception):
    """The workers' items or a phase's tiles do not make up the phase's outputs."""


class Overflow(Exception):
    """More memory than there is."""


@dataclasses.dataclass(frozen=True)
class Look:
    """Reads words of an instance; where they validate themselves, until they are there."""

    phase: str
    words: tuple[int, ...]
    instance: int
    waits: bool


@dataclasses.dataclass(frozen=True)
class Wait:
    phase: str
    count: int


@dataclasses.dataclass(frozen=True)
class Fence:
    """Own stores become visible before any later signal."""


@dataclasses.dataclass(frozen=True)
class Write:
    words: tuple[int, ...]
    instance: int


@dataclasses.dataclass(frozen=True)
class Signal:
    phase: str
    release: bool


@dataclasses.dataclass(frozen=True)
class Fill:
    """The loader issues a unit into its stage."""

    unit: int


@dataclasses.dataclass(frozen=True)
class Begin:
    """Compute waits for a unit and begins to fold it."""

    unit: int


@dataclasses.dataclass(frozen=True)
class End:
    """Compute has read the last of a unit's stage."""

    unit: int


@dataclasses.dataclass(frozen=True)
class Free:
    unit: int


@dataclasses.dataclass(frozen=True)
class Enter:
    """The worker's own shared memory now holds buffers of this step, by its place in the program."""

    step: int


@dataclasses.dataclass(frozen=True)
class Send:
    """Sums of one round to another worker's shared memory, into one of the step's sets of buffers."""

    to: int
    step: int
    round: int
    set: int


@dataclasses.dataclass(frozen=True)
class Receive:
    """Waits for what these workers send in a round."""

    workers: tuple[int, ...]
    step: int
    round: int


@dataclasses.dataclass(frozen=True)
class Use:
    """Reads what was received in a round for the last time."""

    step: int
    round: int


@dataclasses.dataclass(frozen=True)
class Leave:
    """Nothing in the worker's shared memory is needed any more."""


Op = Look | Wait | Fence | Write | Signal | Fill | Begin | End | Free | Enter | Send | Receive | Use | Leave


@dataclasses.dataclass
class Program:
    """What runs. owner: of each word of global memory, its tensor. final: words with the instance they must end up with."""

    compute: list[list[Op]]
    loaders: list[list[Op]]
    owner: list[str]
    final: dict[int, int]
    stages: int
    window: int


class Compiler:
    """Makes the program of a schedule, or raises where its tiles cannot be right whatever the order."""

    def __init__(self, graph: OpGraph, schedule: Schedule) -> None:
        graph = graph.in_order(schedule.order)
        self.graph, self.schedule = graph, schedule
        self.place = {p.name: i for i, p in enumerate(graph.phases)}
        self.busy = {p.name: [self._takes_part(plan, w) for w in range(schedule.workers)] for p, plan in self._plans()}
        self.home = {t: max(p.segment for p in graph.phases if t in p.writes) for t in graph.tensors}
        heads = [p.head_dim for p in graph.phases if p.kind == "attention"]
        self.grain = math.gcd(*(plan.rows for _, plan in self._plans()), *(t.width for t in graph.tensors.values()), *heads)
        self.owner: list[str] = []
        self.base: dict[str, int] = {}
        self.size: dict[str, int] = {}
        for name, tensor in graph.tensors.items():
            plan = schedule.tensor(name)
            self.size[name] = schedule.batch * (plan.splits if tensor.heads else 1) * tensor.width // self.grain
            self.base[name] = len(self.owner)
            self.owner += [name] * (self.size[name] * (1 if tensor.output else plan.incarnations))
        self.written = {p.name: [self._rows(p, plan, w) for w in range(schedule.workers)] for p, plan in self._plans()}
        self.heads = {
            p.name: [self._heads(p, plan, w) for w in range(schedule.workers)] for p, plan in self._plans() if p.kind == "attention"
        }

    def _plans(self) -> list[tuple[Phase, PhasePlan]]:
        return [(p, self.schedule.plan(p.name)) for p in self.graph.phases]

    def _takes_part(self, plan: PhasePlan, worker: int) -> bool:
        """Whether anyone of its cluster has items."""
        return any(part[w][1] for part in plan.tasks for w in self._cluster(plan, worker))

    def _cluster(self, plan: PhasePlan, worker: int) -> list[int]:
        return [w for w in range(self.schedule.workers) if w // plan.cluster == worker // plan.cluster]

    def _rows(self, phase: Phase, plan: PhasePlan, worker: int) -> list[list[int]]:
        """Per part, the words of one slot that a worker writes."""
        out = []
        for part, ranges in zip(phase.parts, plan.tasks, strict=True):
            first, n = ranges[worker]
            words = range(first * plan.rows // self.grain, (first + n) * plan.rows // self.grain)
            whole = part.rows // self.grain
            sequences = self.schedule.batch if phase.kind == "fold" else 1
            out.append([s * whole + word for s in range(sequences) for word in words])
        return out

    def _heads(self, phase: Phase, plan: PhasePlan, worker: int) -> set[tuple[int, int]]:
        """(sequence, kv head) of what an attention's worker folds, for its cluster too."""
        ranges = [plan.tasks[0][peer] for peer in self._cluster(plan, worker)]
        return {divmod(item // plan.splits, phase.kv_heads) for first, n in ranges for item in range(first, first + n)}

    def words(self, tensor: str, instance: int, rows: list[int]) -> tuple[int, ...]:
        slot = instance % self.schedule.tensor(tensor).incarnations
        if (slot and self.graph.tensors[tensor].output) or any(not 0 <= r < self.size[tensor] for r in rows):
            raise Overflow(f"{tensor} has no such row or slot {slot}")
        start = self.base[tensor] + slot * self.size[tensor]
        return tuple(start + r for r in rows)

    def program(self) -> Program:
        compute, loaders = [], []
        for worker in range(self.schedule.workers):
            ops: list[Op] = []
            units = 0
            for place, (phase, iteration) in enumerate(self._steps()):
                if self.busy[phase.name][worker]:
                    streamed = self._units(phase, worker)
                    ops += self._step(phase, iteration, worker, range(units, units + streamed), place)
                    units += streamed
            compute.append(ops)
            loaders.append([Fill(u) for u in range(units)])
        return Program(compute, loaders, self.owner, self._final(), self.schedule.stages, self.schedule.window)

    def _steps(self) -> list[tuple[Phase, int]]:
        return [(self.graph.phase(n), i) for s in self.graph.segments for i in range(s.repeats) for n in s.phases]

    def _units(self, phase: Phase, worker: int) -> int:
        """One per item and matrix: how finely items are cut is nothing to the protocol of the ring."""
        plan = self.schedule.plan(phase.name)
        items = [sum(part[w][1] for w in self._cluster(plan, worker)) for part in plan.tasks]
        return 0 if phase.kind == "map" else sum(n * max(1, len(p.weights)) for n, p in zip(items, phase.parts, strict=True))

    def _step(self, phase: Phase, iteration: int, worker: int, units: range, place: int) -> list[Op]:
        plan, whole, rows = self.schedule.plan(phase.name), self._looks(phase, iteration, worker), self._row_looks(phase, iteration, worker)
        fence: list[Op] = [Fence()] if plan.fence else []
        early = phase.kind == "fold" and all(self.schedule.tensor(t).handoff == "data" for t in phase.row_reads)
        ops: list[Op] = [Enter(place), *(rows if early else []), *fence, *self._waits(phase, iteration), *whole]
        ops += [op for u in units for op in (Begin(u), End(u), Free(u))]
        ops += self._exchanged(plan, worker, place)
        for _ in range(2 if phase.kind == "fold" else 1):  # the last block of a finish may overlap the one before
            ops += [*(whole if plan.pieces > 1 or phase.kind == "map" else []), *rows, *self._writes(phase, iteration, worker)]
        ops.append(Leave())
        kept = [t for t in phase.writes if not self.graph.tensors[t].output]
        if kept:
            ops.append(Signal(phase.name, any(self.schedule.tensor(t).handoff == "counter" for t in kept)))
        return ops

    def _exchanged(self, plan: PhasePlan, worker: int, place: int) -> list[Op]:
        """Three rounds where tiles finish in groups: enough to come back to the first set of buffers."""
        peers, grouped = (
            [w for w in self._cluster(plan, worker) if w != worker],
            any(n > plan.group for part in plan.tasks for _, n in part),
        )
        ops: list[Op] = []
        for number in range(3 if grouped else 1) if peers else ():
            ops += [Send(peer, place, number, number % 2) for peer in peers]
            ops += [Receive(tuple(peers), place, number), Use(place, number)]
        return ops

    def _waits(self, phase: Phase, iteration: int) -> list[Op]:
        out: list[Op] = []
        for name in self.schedule.plan(phase.name).waits:
            before, times = self.graph.phase(name), iteration + (self.place[name] < self.place[phase.name])
            if before.segment != phase.segment:
                times = self.graph.iterations(before) if iteration == 0 else 0
            out.append(Wait(name, times * sum(self.busy[name])))
        return out

    def _by_head(self, phase: Phase, tensor: str) -> bool:
        """Whether a tensor holds an attention's queries, keys or values."""
        width = self.graph.tensors[tensor].width
        return phase.kind == "attention" and width in (phase.heads * phase.head_dim, phase.kv_heads * phase.head_dim)

    def _looks(self, phase: Phase, iteration: int, worker: int) -> list[Op]:
        return [self._look(phase, t, iteration, self._columns(phase, t, worker)) for t in phase.reads]

    def _columns(self, phase: Phase, tensor: str, worker: int) -> list[int]:
        """Words of what a phase reads whole: of a fold that a cluster shares, those that begin in this worker's piece of a part; of queries, keys
        and values, those of the heads that an attention's worker folds."""
        plan, width = self.schedule.plan(phase.name), self.graph.tensors[tensor].width
        rank, part = worker % plan.cluster, max(1, width // plan.parts)
        every = list(range(self.size[tensor]))
        if self._by_head(phase, tensor):
            head = width // phase.kv_heads
            return [w for w in every if divmod(w * self.grain // head, phase.kv_heads) in self.heads[phase.name][worker]]
        if plan.cluster == 1 or phase.kind != "fold":
            return every
        return [w for w in every if w * self.grain % width % part * plan.cluster // part == rank]

    def _row_looks(self, phase: Phase, iteration: int, worker: int) -> list[Op]:
        """At what its finish adds: the rows that it writes, of parts that are as wide."""
        written = list(zip(phase.parts, self.written[phase.name][worker], strict=True))
        widths = {t: self.graph.tensors[t].width for t in phase.row_reads}
        added = {t: {row for part, rows in written if part.rows == width for row in rows} for t, width in widths.items()}
        return [self._look(phase, t, iteration, sorted(rows)) for t, rows in added.items()]

    def _look(self, phase: Phase, tensor: str, iteration: int, rows: list[int]) -> Op:
        home, carried = self.home[tensor], self.graph.tensors[tensor].carried
        last = self.graph.segments[home].repeats if carried and phase.segment > home else 0
        instance = iteration if phase.segment == home else last
        return Look(phase.name, self.words(tensor, instance, rows), instance, self.schedule.tensor(tensor).handoff == "data")

    def _writes(self, phase: Phase, iteration: int, worker: int) -> list[Op]:
        ops: list[Op] = []
        for part, rows in zip(phase.parts, self.written[phase.name][worker], strict=True):
            for tensor in part.writes:
                plan, inside = self.schedule.tensor(tensor), phase.segment == self.home[tensor]
                instance = iteration + self.graph.tensors[tensor].carried if inside else 0
                ops.append(Write(self.words(tensor, instance, rows), instance))
                if inside and plan.handoff == "data" and plan.incarnations > 1:
                    ops.append(Write(self.words(tensor, instance + 1, rows), SENTINEL))
        return ops

    def _final(self) -> dict[int, int]:
        """Outputs and loop states end with their last instance."""
        out = {}
        for name, tensor in self.graph.tensors.items():
            repeats = self.graph.segments[self.home[name]].repeats
            instance = repeats if tensor.carried else repeats - 1
            out |= dict.fromkeys(self.words(name, instance, list(range(self.size[name]))), instance)
        return out
