"""Thousands of broken schedules: what hangs, races or miscomputes is never accepted, and the simulator does find what is broken.

Every mutant that the proof accepts is simulated. Of those that it refuses a sample is, which tells how many of them would have failed.
The default run takes the first of the mutants that `pytest -m slow` takes: the same everywhere.
"""

import collections
import dataclasses
import itertools
import random
from collections.abc import Iterator

import pytest
from oracle.mutations import MUTATIONS
from oracle.operations import Miscompute, Overflow
from oracle.program import Compiler
from oracle.protocol import PROTOCOL, broken
from oracle.simulator import Hang, Race, Simulator
from oracle.sources import SOURCES, Source
from oracle.tiles import check_tiles

from mkdsl.proof import Rule, ScheduleError, _verify, verify_schedule
from mkdsl.schedule import Schedule
from mkdsl.search._draft import with_memory

pytestmark = pytest.mark.medium

FEW, MANY = {"decoders": 15, "random": 80}, {"decoders": 200, "random": 330}  # mutants of each kind
SIZES = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]
COLUMNS = ("mutants", "refused", "accepted", "accepted, run", "of refused, run", "of these failed")
FAILURES = (Race, Hang, Miscompute, Overflow)
NO_PROGRAM = (ArithmeticError, LookupError, TypeError, ValueError, StopIteration)  # tables that nothing could run


def accepts(source: Source, schedule: Schedule) -> bool:
    try:
        verify_schedule(source.graph, schedule, source.gpu)
    except ScheduleError:
        return False
    return True


def failure(source: Source, schedule: Schedule, seeds: int) -> str | None:
    """How a schedule fails in some interleaving, if it does."""
    try:
        check_tiles(source.graph, schedule, source.gpu)
        program = Compiler(source.graph, schedule).program()
        for seed in range(seeds):
            Simulator(program, seed, ring=seed % 4 == 0).run()
    except (*FAILURES, *NO_PROGRAM) as error:
        return f"{type(error).__name__}: {error}"
    return None


def told(schedule: Schedule) -> str:
    """All of it, in text that tells 2 from 2.0."""
    return repr([getattr(schedule, field.name) for field in dataclasses.fields(schedule)])


def mutants(kind: str, of: str, count: int) -> Iterator[tuple[Source, Schedule]]:
    """Up to so many distinct ones, each other than what it was made from. Always the same, the first of as many as one asks for."""
    r, seen = random.Random(f"{kind} {of}"), set()
    sources = r.sample(SOURCES[of](), len(SOURCES[of]()))
    for attempt in range(8 * count):
        source = sources[attempt % len(sources)]
        try:
            schedule = MUTATIONS[kind](r, source.graph, source.schedule)
            schedule = with_memory(source.graph, schedule) if kind not in ("shared_memory", "types") and r.random() < 0.8 else schedule
        except NO_PROGRAM:  # the source has nothing of that kind, or no memory could be counted
            continue
        key = attempt % len(sources), told(schedule)
        if key[1] != told(source.schedule) and key not in seen:
            seen.add(key)
            yield source, schedule
        if len(seen) == count:
            return


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("of", SOURCES)
@pytest.mark.parametrize("kind", MUTATIONS)
def test_no_broken_schedule_is_accepted(kind, of, size, record_property):
    counts = collections.Counter()
    for source, schedule in mutants(kind, of, size[of]):
        accepted = accepts(source, schedule)
        counts["mutants"] += 1
        counts["accepted" if accepted else "refused"] += 1
        if accepted or counts["refused"] % 5 == 1:
            failed = failure(source, schedule, 3)
            assert not (accepted and failed), f"accepted, but {failed}\n{schedule.to_json()}"
            counts["accepted, run" if accepted else "of refused, run"] += 1
            counts["of these failed"] += bool(failed)
    record_property("adversarial", {"kind": kind} | {c: counts[c] for c in COLUMNS})
    assert counts["mutants"] >= 10


@pytest.mark.parametrize("of", SOURCES)
def test_what_the_search_makes_is_accepted_and_survives(of, record_property):
    counts = collections.Counter()
    for source in SOURCES[of]():
        verify_schedule(source.graph, source.schedule, source.gpu)
        assert failure(source, source.schedule, 5) is None
        counts += collections.Counter({"accepted": 1, "accepted, run": 1})
    record_property("adversarial", {"kind": "(unchanged)"} | {c: counts[c] for c in COLUMNS})


NEEDED = {  # by condition on the order of events: mutants of small graphs among which one that shows it is found soon
    Rule.BEFORE: "dropped_wait", Rule.CLEAR: "incarnations", Rule.FENCE: "dropped_fence", Rule.EARLY: "dropped_fence",
    Rule.REUSE: "incarnations", Rule.EXCHANGE: "clusters", Rule.COUNT: "other_wait",
}  # fmt: skip


def without(rule: Rule, patch: pytest.MonkeyPatch) -> None:
    """Makes the proof blind for one condition."""

    def blind(violations):
        return lambda *args: (v for v in violations(*args) if v.rule is not rule)

    for name in ("overtakings", "exchanges"):
        patch.setattr(_verify, name, blind(getattr(_verify, name)))
    for name in ("violations", "unfenced"):
        patch.setattr(_verify.Accesses, name, blind(getattr(_verify.Accesses, name)))


@pytest.mark.parametrize("rule", NEEDED, ids=lambda rule: rule.name)
def test_each_condition_of_the_proof_is_needed(rule, monkeypatch):
    """Without it the proof would accept one of the corpus that fails."""
    kinds = itertools.chain([(NEEDED[rule], "random")], itertools.product(MUTATIONS, SOURCES))
    for source, schedule in itertools.chain.from_iterable(mutants(kind, of, MANY[of]) for kind, of in kinds):
        with monkeypatch.context() as patch:
            without(rule, patch)
            accepted = accepts(source, schedule)
        if accepted and not accepts(source, schedule) and failure(source, schedule, 240):
            return
    pytest.fail("no mutant of the corpus needs it")


@pytest.mark.parametrize("of", [pytest.param("decoders", marks=pytest.mark.slow), "random"])
@pytest.mark.parametrize("kind", PROTOCOL)
def test_the_simulator_finds_a_broken_protocol(kind, of, record_property):
    """Or surviving it would mean nothing."""
    r, counts = random.Random(kind), collections.Counter()
    sound = (Compiler(source.graph, source.schedule).program() for source in SOURCES[of]())
    for program in (broken(r, p, kind) for p in sound for _ in range(2)):
        if program is None:  # it has nothing of that kind
            continue
        counts["programs"] += 1
        try:
            for seed in range(4):
                Simulator(program, seed, ring=True).run()
        except FAILURES as error:
            counts[type(error).__name__.lower()] += 1
    record_property("protocol", {"kind": kind} | {c: counts[c] for c in ("programs", "race", "hang")})
    assert counts["race"] + counts["hang"] > 0
