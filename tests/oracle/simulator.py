"""Runs a `Program` under an order of memory as weak as a GPU's and adversarial besides.

Every store stays private to its worker until it is committed, at a moment picked at random, in any order except per word; a fence
commits all of a worker's. Signals are seen at once, before the stores they follow, unless they release. Copies into the ring land in any
order. Independent of the proof: it knows no clocks.

Each run has a strategy against the schedule: it may starve one agent as long as anybody else gets on, or let one sprint; and it may hold
back stores, all of them, or clears alone, or those of one tensor, until nobody gets on without them.
"""

import random

from mkdsl.graph import OpGraph
from mkdsl.schedule import Schedule
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
    Program,
    Receive,
    Send,
    Signal,
    Use,
    Wait,
    Write,
)
from oracle.program import Compiler


class Race(Exception):
    """A worker saw a word of the wrong instance, or a stage that was being filled."""


class Hang(Exception):
    """No worker can go on."""


class Simulator:
    """One run; `seed` picks the strategy and the interleaving. ring: whether loaders run too."""

    def __init__(self, program: Program, seed: int, *, ring: bool = True) -> None:
        self.program, self.random, self.ring = program, random.Random(seed), ring
        agents = [*enumerate(program.compute), *(enumerate(program.loaders) if ring else ())]
        self.agents = [(w, self._without_ring(ops)) for w, ops in agents]
        self.at = [0] * len(self.agents)
        self.memory = [SENTINEL] * len(program.owner)
        self.pending: list[dict[int, list[int]]] = [{} for _ in program.compute]
        self.counts: dict[str, int] = {}
        self._empty_shared_memory()
        self._choose_strategy()

    def _empty_shared_memory(self) -> None:
        """Of each worker. stage: the unit that each holds. issued: units not yet landed. in_use: the step whose buffers it holds. sent: (round,
        sender) of the sums it holds, to the set they lie in. sums_of: the step that these are of."""
        workers = range(len(self.program.compute))
        self.stage = [[-1] * self.program.num_stages for _ in workers]
        self.issued: list[set[int]] = [set() for _ in workers]
        self.landed: list[set[int]] = [set() for _ in workers]
        self.freed: list[set[int]] = [set() for _ in workers]
        self.in_use: list[int | None] = [None for _ in workers]
        self.sent: list[dict[tuple[int, int], int]] = [{} for _ in workers]
        self.sums_of = [-1 for _ in workers]

    def _choose_strategy(self) -> None:
        """slow: an agent that is starved. burst: operations of a turn. commits: how often memory moves on, per turn; in any case when nobody
        gets on. held: a tensor whose stores are held back."""
        self.slow = self.random.choice([None, *range(len(self.agents))])
        self.burst = self.random.choice([(1,), (1, 1, 4, 40), (1000,)])
        self.commits = self.random.choice((0.3, 0.03, 0.0))
        self.held = self.random.choice([None, None, *sorted(set(self.program.owner))])
        self.clears_last = self.random.random() < 0.5

    def _without_ring(self, ops: list[Op]) -> list[Op]:
        return ops if self.ring else [op for op in ops if not isinstance(op, Begin | End | Free)]

    def run(self) -> None:
        """Raises Race, or Hang, or returns: every word ended as it should."""
        self._run_to_end()
        for pending in self.pending:
            self._flush(pending)
        for word, instance in self.program.final.items():
            if self.memory[word] != instance:
                raise Race(f"{self.program.owner[word]} ends as {self.memory[word]}, not {instance}")

    def _run_to_end(self) -> None:
        ready = [a for a, (_, ops) in enumerate(self.agents) if ops]
        blocked: list[int] = []
        while ready or blocked:
            if not ready:
                if not self._commit_one():
                    raise Hang(f"{len(blocked)} agents wait for ever")
                ready, blocked = blocked, []
            agent = self._pick(ready)
            changed, stuck = self._turn(agent)
            if stuck or self.at[agent] == len(self.agents[agent][1]):
                ready.remove(agent)
                blocked += [agent] if stuck else []
            committed = self.random.random() < self.commits and self._commit_one()
            if committed:
                ready, blocked = ready + blocked, []
            elif changed:  # for others
                ready, blocked = ready + [a for a in blocked if a != agent], [a for a in blocked if a == agent]

    def _pick(self, ready: list[int]) -> int:
        quick = [a for a in ready if a != self.slow] or ready
        return self.random.choice(quick)

    def _turn(self, agent: int) -> tuple[bool, bool]:
        """Runs an agent for a while. Returns whether something changed for others, and whether it is stuck."""
        worker, ops = self.agents[agent]
        changed = False
        for _ in range(self.random.choice(self.burst)):
            if self.at[agent] == len(ops):
                break
            op = ops[self.at[agent]]
            if not self._ready(worker, op):
                return changed, True
            self._do(worker, op)
            self.at[agent] += 1
            changed |= isinstance(op, Signal | Fence | Fill | Free | Send)
        return changed, False

    def _ready(self, worker: int, op: Op) -> bool:
        if isinstance(op, Wait):
            return self.counts.get(op.phase, 0) >= op.count
        if isinstance(op, Look):
            return self._look(worker, op)
        if isinstance(op, Receive):
            return all((op.round, peer) in self.sent[worker] for peer in op.peers)
        if isinstance(op, Fill):
            free = op.unit < self.program.num_stages or op.unit - self.program.num_stages in self.freed[worker]
            return free and (op.unit < self.program.max_in_flight or self._full(worker, op.unit - self.program.max_in_flight))
        return not isinstance(op, Begin) or self._full(worker, op.unit)

    def _full(self, worker: int, unit: int) -> bool:
        """Whether a stage's barrier says that a unit has landed. It tells one use from the next only: past that, waiting is for ever."""
        if unit + self.program.num_stages in self.landed[worker]:
            raise Hang(f"unit {unit}'s stage has been filled again")
        return unit in self.landed[worker]

    def _look(self, worker: int, op: Look) -> bool:
        mine = self.pending[worker]
        for word in op.words:
            seen = mine[word][-1] if word in mine else self.memory[word]
            if seen == SENTINEL and op.waits:
                return False
            if seen != op.instance:
                raise Race(f"{op.phase} on worker {worker}: {self.program.owner[word]} of instance {seen}, not {op.instance}")
        return True

    def _do(self, worker: int, op: Op) -> None:
        if isinstance(op, Write):
            for word in op.words:
                self.pending[worker].setdefault(word, []).append(op.instance)
        elif isinstance(op, Fence):
            self._flush(self.pending[worker])
        elif isinstance(op, Signal):
            if op.release:
                self._flush(self.pending[worker])
            self.counts[op.phase] = self.counts.get(op.phase, 0) + 1
        elif isinstance(op, Begin | End | Fill | Free):
            self._stream(worker, op)
        elif isinstance(op, Enter | Send | Use | Leave):
            self._share(worker, op)

    def _stream(self, worker: int, op: Begin | End | Fill | Free) -> None:
        """The ring: a stage that is filled while it is read is a race."""
        slot = op.unit % self.program.num_stages
        if isinstance(op, Fill):
            self.stage[worker][slot] = op.unit
            self.issued[worker].add(op.unit)
        elif isinstance(op, Free):
            self.freed[worker].add(op.unit)
        elif self.stage[worker][slot] != op.unit:
            raise Race(f"worker {worker}: the stage of unit {op.unit} is being filled again")

    def _share(self, worker: int, op: Enter | Send | Use | Leave) -> None:
        """Shared memory, in which a cluster's workers write to each other's."""
        if isinstance(op, Enter):
            if self.sent[worker] and self.sums_of[worker] != op.step:
                raise Race(f"worker {worker}: step {op.step} overwrites sums of step {self.sums_of[worker]}")
            self.in_use[worker] = op.step
        elif isinstance(op, Leave):
            self.in_use[worker] = None
        elif isinstance(op, Use):
            self.sent[worker] = {key: at for key, at in self.sent[worker].items() if key[0] != op.round}
        else:
            self._send(worker, op)

    def _send(self, worker: int, op: Send) -> None:
        held = self.sent[op.to]
        if self.in_use[op.to] not in (None, op.step) or (held and self.sums_of[op.to] != op.step):
            raise Race(f"worker {worker}: sums of step {op.step} overwrite worker {op.to}'s step {self.in_use[op.to]}")
        if any(at == op.set and number != op.round for (number, _), at in held.items()):
            raise Race(f"worker {worker}: sums of round {op.round} overwrite those of a former one")
        held[op.round, worker] = op.set
        self.sums_of[op.to] = op.step

    def _flush(self, pending: dict[int, list[int]]) -> None:
        for word, values in pending.items():
            self.memory[word] = values[-1]
        pending.clear()

    def _commit_one(self) -> bool:
        """One step of the memory system: some stores become visible, or a copy lands. Whether there was anything to do."""
        flying = [w for w, units in enumerate(self.issued) if units]
        full = [p for p in self.pending if p]
        if flying and (not full or self.random.random() < 0.5):
            worker = self.random.choice(flying)
            unit = self.random.choice(sorted(self.issued[worker]))
            self.issued[worker].discard(unit)
            self.landed[worker].add(unit)
            return True
        if full:
            self._commit_some(self.random.choice(full))
        return bool(full)

    def _commit_some(self, pending: dict[int, list[int]]) -> None:
        words = list(pending)
        if self.held:
            words = [w for w in words if self.program.owner[w] != self.held] or words
        if self.clears_last:
            words = [w for w in words if pending[w][0] != SENTINEL] or words
        for word in self.random.sample(words, self.random.choice((1, 1 + len(words) // 4))):
            self.memory[word] = pending[word].pop(0)
            if not pending[word]:
                del pending[word]


def simulate(graph: OpGraph, schedule: Schedule, seeds: int = 5) -> None:
    """Runs a schedule in several interleavings. Raises Race or Hang."""
    program = Compiler(graph, schedule).program()
    for seed in range(seeds):
        Simulator(program, seed, ring=seed % 4 == 0).run()
