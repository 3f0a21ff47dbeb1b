"""A schedule as an explicit program: the protocol that `mkdsl.lower` emits, written down a second time and without looking at the proof."""

import math

from mkdsl.graph import AttentionPhase, FoldPhase, MapPhase, OpGraph, Phase
from mkdsl.schedule import AttentionPlan, FoldPlan, Handoff, MapPlan, PhasePlan, Schedule
from oracle.operations import (
    SENTINEL,
    Begin,
    End,
    Enter,
    Fence,
    Fill,
    Free,
    Leave,
    Look,
    Op,
    Overflow,
    Program,
    Receive,
    Send,
    Signal,
    Use,
    Wait,
    Write,
)

ROUNDS = 3  # of an exchange that has several: enough to come back to the first set of buffers


def item_rows(phase: Phase, plan: PhasePlan) -> int:
    """Rows of a tensor that one item writes."""
    if isinstance(phase, AttentionPhase):
        return phase.heads // phase.kv_heads * phase.head_dim  # all that attend to one kv head
    assert isinstance(plan, FoldPlan | MapPlan)
    return plan.rows if isinstance(plan, MapPlan) else 64 // plan.split_k


def cluster_of(plan: PhasePlan, worker: int) -> list[int]:
    """The workers that fold their items together with this one's; itself included."""
    return [w for w in range(len(plan.tasks[0])) if w // plan.cluster == worker // plan.cluster]


class Memory:
    """Global memory: where each tensor's slots begin. A word is a few rows of one sequence, as many as divide all that is written or read."""

    def __init__(self, graph: OpGraph, schedule: Schedule) -> None:
        self.graph, self.schedule = graph, schedule
        heads = [p.head_dim for p in graph.phases if isinstance(p, AttentionPhase)]
        items = [item_rows(p, schedule.plan(p.name)) for p in graph.phases]
        self.grain = math.gcd(*items, *(t.width for t in graph.tensors.values()), *heads)
        self.owner: list[str] = []
        self.base: dict[str, int] = {}
        self.size: dict[str, int] = {}
        for name, tensor in graph.tensors.items():
            plan = schedule.tensor(name)
            self.size[name] = schedule.batch * (plan.splits if tensor.heads else 1) * tensor.width // self.grain
            self.base[name] = len(self.owner)
            self.owner += [name] * (self.size[name] * (1 if tensor.output else plan.incarnations))

    def words(self, tensor: str, instance: int, rows: list[int]) -> tuple[int, ...]:
        """Of these words of one slot."""
        slot = instance % self.schedule.tensor(tensor).incarnations
        if (slot and self.graph.tensors[tensor].output) or any(not 0 <= r < self.size[tensor] for r in rows):
            raise Overflow(f"{tensor} has no such row or slot {slot}")
        start = self.base[tensor] + slot * self.size[tensor]
        return tuple(start + r for r in rows)

    def written(self, phase: Phase, worker: int) -> list[list[int]]:
        """Per part, the words of one slot that a worker writes. A fold's item is of all sequences, others' of one."""
        plan, out = self.schedule.plan(phase.name), []
        rows = item_rows(phase, plan)
        for part, ranges in zip(phase.parts, plan.tasks, strict=True):
            first, n = ranges[worker]
            words = range(first * rows // self.grain, (first + n) * rows // self.grain)
            whole = part.rows // self.grain
            sequences = self.schedule.batch if isinstance(phase, FoldPhase) else 1
            out.append([s * whole + word for s in range(sequences) for word in words])
        return out


class Compiler:
    """Makes the program of a schedule whose tiles are right, or raises where they cannot be."""

    def __init__(self, graph: OpGraph, schedule: Schedule) -> None:
        graph = graph.in_order(schedule.order)
        self.graph, self.schedule, self.memory = graph, schedule, Memory(graph, schedule)
        workers = range(schedule.workers)
        self.place = {p.name: i for i, p in enumerate(graph.phases)}
        self.takes_part = {p.name: [self._takes_part(p, w) for w in workers] for p in graph.phases}
        self.home = {t: max(p.segment for p in graph.phases if t in p.writes) for t in graph.tensors}
        self.written = {p.name: [self.memory.written(p, w) for w in workers] for p in graph.phases}
        attentions = [p for p in graph.phases if isinstance(p, AttentionPhase)]
        self.heads = {p.name: [self._heads(p, w) for w in workers] for p in attentions}

    def program(self) -> Program:
        compute, loaders = [], []
        for worker in range(self.schedule.workers):
            ops: list[Op] = []
            units = 0
            for place, (phase, iteration) in enumerate(self._steps()):
                if self.takes_part[phase.name][worker]:
                    streamed = self._units(phase, worker)
                    ops += self._step(phase, iteration, worker, range(units, units + streamed), place)
                    units += streamed
            compute.append(ops)
            loaders.append([Fill(u) for u in range(units)])
        return Program(compute, loaders, self.memory.owner, self._final(), self.schedule.num_stages, self.schedule.max_in_flight)

    def _takes_part(self, phase: Phase, worker: int) -> bool:
        """Whether anyone of its cluster has items."""
        plan = self.schedule.plan(phase.name)
        return any(part[w][1] for part in plan.tasks for w in cluster_of(plan, worker))

    def _heads(self, phase: AttentionPhase, worker: int) -> set[tuple[int, int]]:
        """(sequence, kv head) of what a worker folds, for its cluster too."""
        plan = self.schedule.plan(phase.name)
        assert isinstance(plan, AttentionPlan)
        ranges = [plan.tasks[0][peer] for peer in cluster_of(plan, worker)]
        return {divmod(item // plan.splits, phase.kv_heads) for first, n in ranges for item in range(first, first + n)}

    def _steps(self) -> list[tuple[Phase, int]]:
        return [(self.graph.phase(n), i) for s in self.graph.segments for i in range(s.repeats) for n in s.phases]

    def _units(self, phase: Phase, worker: int) -> int:
        """One per item and matrix: how finely items are cut is nothing to the protocol of the ring."""
        plan = self.schedule.plan(phase.name)
        items = [sum(part[w][1] for w in cluster_of(plan, worker)) for part in plan.tasks]
        return 0 if isinstance(phase, MapPhase) else sum(n * max(1, len(p.weights)) for n, p in zip(items, phase.parts, strict=True))

    # A step: one phase in one iteration.

    def _step(self, phase: Phase, iteration: int, worker: int, units: range, place: int) -> list[Op]:
        plan, whole, rows = self.schedule.plan(phase.name), self._looks(phase, iteration, worker), self._row_looks(phase, iteration, worker)
        by_itself = all(self.schedule.tensor(t).handoff is Handoff.SENTINEL for t in phase.row_reads)
        ops: list[Op] = [Enter(place), *(rows if isinstance(phase, FoldPhase) and by_itself else [])]
        ops += [*([Fence()] if plan.fence else []), *self._waits(phase, iteration), *whole]
        ops += [op for u in units for op in (Begin(u), End(u), Free(u))]
        ops += self._exchanged(plan, worker, place)
        again = whole if isinstance(phase, MapPhase) or (isinstance(plan, FoldPlan) and plan.k_stages > 1) else []
        for _ in range(2 if isinstance(phase, FoldPhase) else 1):  # the last block of an epilogue may overlap the one before
            ops += [*again, *rows, *self._writes(phase, iteration, worker)]
        return [*ops, Leave(), *self._signals(phase)]

    def _waits(self, phase: Phase, iteration: int) -> list[Op]:
        out: list[Op] = []
        for name in self.schedule.plan(phase.name).waits:
            before, times = self.graph.phase(name), iteration + (self.place[name] < self.place[phase.name])
            if before.segment != phase.segment:
                times = self.graph.iterations(before) if iteration == 0 else 0
            out.append(Wait(name, times * sum(self.takes_part[name])))
        return out

    def _signals(self, phase: Phase) -> list[Op]:
        """None for what nobody in the kernel reads."""
        handoffs = [self.schedule.tensor(t).handoff for t in phase.writes if not self.graph.tensors[t].output]
        return [Signal(phase.name, Handoff.RELEASE_ACQUIRE in handoffs)] if handoffs else []

    def _exchanged(self, plan: PhasePlan, worker: int, place: int) -> list[Op]:
        """Of a cluster that has several epilogues, several rounds."""
        peers = [w for w in cluster_of(plan, worker) if w != worker]
        together = plan.epilogue_tiles if isinstance(plan, FoldPlan) else 1
        several = any(n > together for part in plan.tasks for _, n in part)
        ops: list[Op] = []
        for number in range(ROUNDS if several else 1) if peers else ():
            ops += [Send(peer, place, number, number % 2) for peer in peers]
            ops += [Receive(tuple(peers), place, number), Use(place, number)]
        return ops

    # What it reads and writes.

    def _looks(self, phase: Phase, iteration: int, worker: int) -> list[Op]:
        return [self._look(phase, t, iteration, self._columns(phase, t, worker)) for t in phase.reads]

    def _columns(self, phase: Phase, tensor: str, worker: int) -> list[int]:
        """Words of what a phase reads whole: of queries, keys and values those of the heads that the worker folds; of a fold that a cluster
        shares those that begin in the worker's own stretch of each of the pieces along K."""
        plan, width, grain = self.schedule.plan(phase.name), self.graph.tensors[tensor].width, self.memory.grain
        every = list(range(self.memory.size[tensor]))
        if isinstance(phase, AttentionPhase) and width in (phase.heads * phase.head_dim, phase.kv_heads * phase.head_dim):
            head = width // phase.kv_heads
            return [w for w in every if divmod(w * grain // head, phase.kv_heads) in self.heads[phase.name][worker]]
        if not isinstance(plan, FoldPlan) or plan.cluster == 1:
            return every
        rank, piece = worker % plan.cluster, max(1, width // plan.split_k)
        return [w for w in every if w * grain % width % piece * plan.cluster // piece == rank]

    def _row_looks(self, phase: Phase, iteration: int, worker: int) -> list[Op]:
        """At what its epilogue adds: the rows that it writes, of parts that are as wide."""
        written = list(zip(phase.parts, self.written[phase.name][worker], strict=True))
        widths = {t: self.graph.tensors[t].width for t in phase.row_reads}
        added = {t: {row for part, rows in written if part.rows == width for row in rows} for t, width in widths.items()}
        return [self._look(phase, t, iteration, sorted(rows)) for t, rows in added.items()]

    def _look(self, phase: Phase, tensor: str, iteration: int, rows: list[int]) -> Op:
        home, carried = self.home[tensor], self.graph.tensors[tensor].carried
        last = self.graph.segments[home].repeats if carried and phase.segment > home else 0
        instance = iteration if phase.segment == home else last
        waits = self.schedule.tensor(tensor).handoff is Handoff.SENTINEL
        return Look(phase.name, self.memory.words(tensor, instance, rows), instance, waits)

    def _writes(self, phase: Phase, iteration: int, worker: int) -> list[Op]:
        ops: list[Op] = []
        for part, rows in zip(phase.parts, self.written[phase.name][worker], strict=True):
            for tensor in part.writes:
                plan, inside = self.schedule.tensor(tensor), phase.segment == self.home[tensor]
                instance = iteration + self.graph.tensors[tensor].carried if inside else 0
                ops.append(Write(self.memory.words(tensor, instance, rows), instance))
                if inside and plan.handoff is Handoff.SENTINEL and plan.incarnations > 1:
                    ops.append(Write(self.memory.words(tensor, instance + 1, rows), SENTINEL))
        return ops

    def _final(self) -> dict[int, int]:
        """Outputs and loop states end with their last instance."""
        out = {}
        for name, tensor in self.graph.tensors.items():
            repeats = self.graph.segments[self.home[name]].repeats
            instance = repeats if tensor.carried else repeats - 1
            out |= dict.fromkeys(self.memory.words(name, instance, list(range(self.memory.size[name]))), instance)
        return out
