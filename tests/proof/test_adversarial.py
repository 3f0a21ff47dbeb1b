"""Ten thousand broken schedules: what hangs, races or miscomputes is never accepted, and the simulator does find what is broken.

Every mutant that the proof accepts is simulated. Of those that it refuses a sample is, which tells how many of them would have failed.
"""

import collections
import itertools
import random
from collections.abc import Callable, Iterable, Iterator

import pytest
from oracle.mutations import MUTATIONS
from oracle.program import Compiler, Miscompute, Overflow
from oracle.protocol import PROTOCOL, broken
from oracle.simulator import Hang, Race, Simulator
from oracle.sources import SOURCES, Source
from oracle.tiles import check_tiles

from mkdsl.graph import OpGraph
from mkdsl.proof import ScheduleError, verify_schedule
from mkdsl.schedule import Profile, Schedule
from mkdsl.search import _verify
from mkdsl.search._draft import with_memory

MUTANTS = {"decoders": 200, "random": 330}  # of each kind
COLUMNS = ("mutants", "refused", "accepted", "accepted, run", "of refused, run", "of these failed")
FAILURES = (Race, Hang, Miscompute, Overflow)
NO_PROGRAM = (ArithmeticError, LookupError, TypeError, ValueError, StopIteration)  # tables that nothing could run


def refusal(source: Source, schedule: Schedule) -> str | None:
    try:
        verify_schedule(source.graph, schedule, source.gpu)
    except ScheduleError as error:
        return str(error)
    return None


def failure(graph: OpGraph, schedule: Schedule, gpu: Profile, seeds: int) -> str | None:
    """How a schedule fails in some interleaving, if it does."""
    try:
        check_tiles(graph, schedule, gpu)
        program = Compiler(graph, schedule).program()
        for seed in range(seeds):
            Simulator(program, seed, ring=seed % 4 == 0).run()
    except (*FAILURES, *NO_PROGRAM) as error:
        return f"{type(error).__name__}: {error}"
    return None


def mutants(kind: str, of: str, r: random.Random, chosen: Callable[[Schedule], bool] = lambda _: True) -> Iterator[tuple[Source, Schedule]]:
    """Distinct ones, each other than what it was made from, which is a chosen one."""
    sources, seen = [s for s in SOURCES[of]() if chosen(s.schedule)], set()
    for attempt in range(8 * MUTANTS[of]):
        source = sources[attempt % len(sources)]
        try:
            schedule = MUTATIONS[kind](r, source.graph, source.schedule)
            schedule = with_memory(source.graph, schedule) if kind not in ("shared_memory", "types") and r.random() < 0.8 else schedule
        except NO_PROGRAM:  # the source has nothing of that kind, or no memory could be counted
            continue
        key = attempt % len(sources), repr(schedule)  # which tells 2 from 2.0
        if key[1] != repr(source.schedule) and key not in seen:
            seen.add(key)
            yield source, schedule
        if len(seen) == MUTANTS[of]:
            return


def corpus(chosen: Iterable[tuple[str, str]]) -> Iterator[tuple[Source, Schedule]]:
    """The mutants of these kinds and sources, always the same."""
    for kind, of in chosen:
        yield from mutants(kind, of, random.Random(f"{kind} {of}"))


@pytest.mark.parametrize("of", SOURCES)
@pytest.mark.parametrize("kind", MUTATIONS)
def test_no_broken_schedule_is_accepted(kind, of, record_property):
    counts = collections.Counter()
    for source, schedule in corpus([(kind, of)]):
        refused = refusal(source, schedule)
        counts["mutants"] += 1
        counts["refused" if refused else "accepted"] += 1
        if not refused or counts["refused"] % 5 == 1:
            failed = failure(source.graph, schedule, source.gpu, 3)
            assert refused or not failed, f"accepted, but {failed}\n{schedule.to_json()}"
            counts["of refused, run" if refused else "accepted, run"] += 1
            counts["of these failed"] += bool(failed)
    record_property("adversarial", {"kind": kind} | {c: counts[c] for c in COLUMNS})
    assert counts["mutants"] >= 10


@pytest.mark.parametrize("of", SOURCES)
def test_what_the_search_makes_is_accepted_and_survives(of, record_property):
    counts = collections.Counter()
    for source in SOURCES[of]():
        assert refusal(source, source.schedule) is None
        assert failure(source.graph, source.schedule, source.gpu, 8) is None
        counts += collections.Counter({"accepted": 1, "accepted, run": 1})
    record_property("adversarial", {"kind": "(unchanged)"} | {c: counts[c] for c in COLUMNS})


NEEDED = {  # where a mutant that shows it is found soon
    "before": ("dropped_wait", "decoders"), "clear": ("dropped_wait", "random"), "fence": ("dropped_wait", "random"),
    "exchange": ("clusters", "random"),
    "early": ("handed_on_task", "decoders", lambda s: s.workers == 6 and s.order[2:4] == ("attention", "wd")),
    "reuse": ("incarnations", "random", lambda s: "p4" in s.order and {t.handoff for t in s.tensors} == {"counter"}),
    "count": ("several", "random", lambda s: "free" in s.order),
}  # fmt: skip


@pytest.mark.parametrize("condition", NEEDED)
def test_each_condition_of_the_proof_is_needed(condition, monkeypatch):
    """Without it the proof would accept one of the corpus that fails."""

    def without(violations):
        return lambda *args: (v for v in violations(*args) if v.kind != condition)

    kind, of, *chosen = NEEDED[condition]
    likely = mutants(kind, of, random.Random(condition), *chosen)
    for source, schedule in itertools.chain(likely, corpus(itertools.product(MUTATIONS, SOURCES))):
        with monkeypatch.context() as patch:
            for name in ("overtakings", "exchanges"):
                patch.setattr(_verify, name, without(getattr(_verify, name)))
            for name in ("violations", "unfenced"):
                patch.setattr(_verify.Accesses, name, without(getattr(_verify.Accesses, name)))
            accepted = refusal(source, schedule) is None
        if accepted and refusal(source, schedule) and failure(source.graph, schedule, source.gpu, 240):
            return
    pytest.fail("no mutant of the corpus needs it")


@pytest.mark.parametrize("kind", PROTOCOL)
def test_the_simulator_finds_a_broken_protocol(kind, record_property):
    """Or surviving it would mean nothing."""
    r, counts = random.Random(kind), collections.Counter()
    for source in SOURCES["decoders"]():
        program = broken(r, Compiler(source.graph, source.schedule).program(), kind)
        if program is None:
            continue
        counts["programs"] += 1
        try:
            for seed in range(6):
                Simulator(program, seed, ring=True).run()
        except FAILURES as error:
            counts[type(error).__name__.lower()] += 1
    record_property("protocol", {"kind": kind} | {c: counts[c] for c in ("programs", "race", "hang")})
    assert counts["race"] + counts["hang"] > 0
