"""A step-by-step simulation of workers that run a schedule, under an order of memory as weak as a GPU's and adversarial besides.

Every store stays private to its worker until it is committed, at a moment picked at random, in any order except per word; a fence
commits all of a worker's. Signals are seen at once, before the stores they follow, unless they release. Independent of the proof: it
knows no clocks.
"""

import random
from collections.abc import Generator

import numpy as np

from mkdsl.graph import OpGraph, Phase
from mkdsl.search import Schedule
from mkdsl.search._races import home, owners, read_instance, written_instance

SENTINEL = None
Word = tuple[str, int, int]  # tensor, slot, word


class Race(Exception):
    """A worker saw a word of the wrong instance."""


class Hang(Exception):
    """No worker can go on."""


class _Step:
    def __init__(self, phase: Phase, iteration: int) -> None:
        self.phase, self.iteration = phase, iteration


class Simulator:
    """One run; `seed` picks the interleaving."""

    def __init__(self, graph: OpGraph, schedule: Schedule, seed: int) -> None:
        self.graph, self.schedule, self.random = graph, schedule, random.Random(seed)
        self.position = {p.name: i for i, p in enumerate(graph.phases)}
        self.memory: dict[Word, int | None] = {}
        self.pending: list[dict[Word, list[int | None]]] = [{} for _ in range(schedule.workers)]
        self.count = {p.name: 0 for p in graph.phases}
        self.words = {p.name: self._words(p) for p in graph.phases}

    def _words(self, phase: Phase) -> list[dict[str, set[int]]]:
        """Per worker and written tensor: the words it writes. A word stands for 8 rows of a sequence."""
        plan, batch = self.schedule.plan(phase.name), self.schedule.batch
        out: list[dict[str, set[int]]] = [{} for _ in range(self.schedule.workers)]
        for i, part in enumerate(phase.parts):
            who = owners(phase, plan, i, batch)
            who = who[:, ::8].ravel() if phase.kind != "attention" else np.repeat(who, plan.rows // 8)
            for word, worker in enumerate(who):
                for name in part.writes:
                    out[int(worker)].setdefault(name, set()).add(word)
        return out

    def run(self) -> None:
        threads = {w: self._worker(w) for w in range(self.schedule.workers)}
        commits = self.random.choice((0.2, 0.02, 0.0))  # per turn; in any case when nobody gets on
        self.clears_last = self.random.random() < 0.5
        idle = 0
        while threads:
            worker = self.random.choice(sorted(threads))
            for _ in range(self.random.choice((1, 1, 4, 40))):
                try:
                    moved = next(threads[worker])
                except StopIteration:
                    del threads[worker]
                    moved = True
                idle = 0 if moved else idle + 1
                if not moved or worker not in threads:
                    break
            if self.random.random() < commits or idle > 5:
                idle = 0 if self._commit_one() else idle
            if idle > 60 * (len(threads) + 1):
                raise Hang(f"workers {sorted(threads)} wait for ever")

    def _commit_one(self) -> bool:
        full = [p for p in self.pending if p]
        if not full:
            return False
        pending = self.random.choice(full)
        words = list(pending)
        if self.clears_last:
            words = [w for w in words if pending[w][0] is not SENTINEL] or words
        self._commit(pending, self.random.choice(words))
        return True

    def _commit(self, pending: dict[Word, list[int | None]], word: Word) -> None:
        self.memory[word] = pending[word].pop(0)
        if not pending[word]:
            del pending[word]

    def _fence(self, worker: int) -> None:
        pending = self.pending[worker]
        while pending:
            self._commit(pending, next(iter(pending)))

    def _worker(self, worker: int) -> Generator[bool]:
        """Yields whether it got on."""
        for segment in self.graph.segments:
            for iteration in range(segment.repeats):
                for name in segment.phases:
                    if worker in self.schedule.plan(name).participants():
                        yield from self._step(worker, _Step(self.graph.phase(name), iteration))

    def _step(self, worker: int, step: _Step) -> Generator[bool]:
        phase, plan = step.phase, self.schedule.plan(step.phase.name)
        if self.schedule.preloads(phase):
            yield from self._read(worker, step, phase.row_reads, self._own_rows(worker, phase))
        for name, times in self._waits(step):
            while self.count[name] < times * len(self.schedule.plan(name).participants()):
                yield False
        yield from self._read(worker, step, phase.reads, None)
        if plan.fence:
            self._fence(worker)
        for _ in range(2 if phase.kind == "fold" else 1):  # the last block of a finish may overlap the one before
            if plan.pieces > 1 or phase.kind == "map":
                yield from self._read(worker, step, phase.reads, None)
            yield from self._read(worker, step, phase.row_reads, self._own_rows(worker, phase))
            yield from self._write(worker, step)
        if any(self.schedule.tensor(t).handoff == "counter" for t in phase.writes):
            self._fence(worker)
        self.count[phase.name] += 1
        yield True

    def _waits(self, step: _Step) -> list[tuple[str, int]]:
        out = []
        for name in self.schedule.plan(step.phase.name).waits:
            before = self.graph.phase(name)
            if before.segment < step.phase.segment:
                out += [(name, self.graph.iterations(before))] if step.iteration == 0 else []
            else:
                out.append((name, step.iteration + (self.position[name] < self.position[step.phase.name])))
        return out

    def _own_rows(self, worker: int, phase: Phase) -> dict[int, set[int]]:
        """By width: the words of the rows that a worker finishes."""
        out: dict[int, set[int]] = {}
        for part in phase.parts:
            out.setdefault(part.rows, set()).update(self.words[phase.name][worker].get(part.writes[0], set()))
        return out

    def _read(self, worker: int, step: _Step, tensors: tuple[str, ...], rows: dict[int, set[int]] | None) -> Generator[bool]:
        for name in tensors:
            tensor, plan = self.graph.tensors[name], self.schedule.tensor(name)
            segment = home(self.graph, name)
            n = read_instance(tensor, segment, step, self.graph.segments[segment].repeats)  # pyright: ignore[reportArgumentType]
            wanted = rows.get(tensor.width, set()) if rows is not None else self._all(name)
            for word in self.random.sample(sorted(wanted), len(wanted)):
                at = name, n % plan.incarnations, word
                while (seen := self._seen(worker, at)) is SENTINEL and plan.handoff == "data":
                    yield False
                if seen != n:
                    raise Race(
                        f"{step.phase.name} in iteration {step.iteration}, worker {worker}: {name} word {word} of instance {seen}, not {n}"
                    )
            yield True

    def _all(self, name: str) -> set[int]:
        return set().union(*(w.get(name, set()) for p in self.graph.phases for w in self.words[p.name]))

    def _seen(self, worker: int, at: Word) -> int | None:
        mine = self.pending[worker].get(at)
        return mine[-1] if mine else self.memory.get(at, SENTINEL)

    def _write(self, worker: int, step: _Step) -> Generator[bool]:
        for name, words in self.words[step.phase.name][worker].items():
            tensor, plan = self.graph.tensors[name], self.schedule.tensor(name)
            segment = home(self.graph, name)
            n = written_instance(tensor, segment, step)  # pyright: ignore[reportArgumentType]
            clears = plan.handoff == "data" and plan.incarnations > 1 and step.phase.segment == segment
            for word in sorted(words):
                self._put(worker, (name, n % plan.incarnations, word), n)
                if clears:
                    self._put(worker, (name, (n + 1) % plan.incarnations, word), SENTINEL)
        yield True

    def _put(self, worker: int, at: Word, value: int | None) -> None:
        self.pending[worker].setdefault(at, []).append(value)


def simulate(graph: OpGraph, schedule: Schedule, seeds: int = 5) -> None:
    """Runs a schedule in several interleavings. Raises Race or Hang."""
    for seed in range(seeds):
        Simulator(graph, schedule, seed).run()
