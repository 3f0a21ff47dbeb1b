"""Times that follow from spans, and the trace for Perfetto."""

from found import found
from oracle.graphs import tiny

from mkdsl.schedule import profile
from mkdsl.simulate import Span, Timeline, observed, simulate, trace_events
from mkdsl.simulate._timeline import timeline

COHORTS = ((0, 2), (1,))
LOOP = ("wq+wk+wv", "attention", "wo", "wg·wu", "wd")


def span(cohort: int, phase: str, iteration: int, signalled: float) -> Span:
    return Span(cohort, phase, iteration, signalled - 4, signalled - 3, signalled - 2, signalled - 1, signalled)


def spans(iterations: int) -> list[Span]:
    """A loop whose first iteration takes 50 us and each further one 20; then the head, 7 us. Cohort 1 is a microsecond ahead."""
    steps = [("map", 0, 10.0)]
    for i in range(iterations):
        steps += [(name, i, 60.0 + 20 * i - 4 * (len(LOOP) - 1 - n)) for n, name in enumerate(LOOP)]
    steps.append(("embed", 0, steps[-1][2] + 7))
    return [span(cohort, name, i, end - cohort) for cohort in (0, 1) for name, i, end in steps]


def test_a_phase_takes_from_the_last_signal_before_it_to_its_own():
    out = timeline(tiny(4), (1, 4, 1), COHORTS, spans(4), 99)
    assert dict(out.phase_us) == {"map": 10.0} | dict.fromkeys(LOOP, 4.0) | {"embed": 7.0}
    assert (out.us, out.events) == (10 + 50 + 3 * 20 + 7, 99)


def test_iterations_that_are_left_out_count_like_the_last():
    out = timeline(tiny(100), (1, 4, 1), COHORTS, spans(4), 0)
    assert out.us == 10 + 50 + 99 * 20 + 7


def test_a_phase_that_ends_before_the_one_before_it_takes_no_time():
    """Phases side by side need not end in order."""
    early = [s._replace(signalled=s.signalled - 9) if s.phase == "attention" else s for s in spans(4)]
    took = dict(timeline(tiny(4), (1, 4, 1), COHORTS, early, 0).phase_us)
    assert (took["attention"], took["wo"]) == (0.0, 8.0)


def test_a_trace_has_a_track_for_each_worker_and_each_moment_of_a_span():
    trace = trace_events(Timeline(COHORTS, (span(0, "map", 0, 4.0),), 4.0, (), 0))
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] in ("process_name", "thread_name")]
    assert names == ["predicted", "SM 0", "SM 1", "SM 2"]
    slices = [(e["tid"], e["name"], e["ts"], e["dur"]) for e in trace["traceEvents"] if e["ph"] == "X"]
    of_one = [("map", 0.0, 4.0), ("wait", 0.0, 1.0), ("read", 1.0, 1.0), ("fold", 2.0, 1.0), ("epilogue", 3.0, 1.0)]
    assert slices == [(worker, *s) for worker in (0, 2) for s in of_one]


def test_what_was_measured_is_a_process_of_its_own():
    one, other = (Timeline(((0,),), (span(0, "map", 0, end),), end, (), 0) for end in (4.0, 6.0))
    events = trace_events(one, other)["traceEvents"]
    assert {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"} == {0: "predicted", 1: "measured"}
    assert [(e["pid"], e["ts"]) for e in events if e["name"] == "map"] == [(0, 0.0), (1, 2.0)]


def test_what_the_median_worker_does_in_the_steady_state():
    """Each of the three workers counts once, the two of cohort 0 too, and of a loop not the first two iterations."""
    slow = Span(1, "wo", 2, 0.0, 9.0, 9.5, 11.5, 12.5)
    early = [s._replace(known=s.arrived) for s in spans(2) if s.phase == "wo"]
    played = Timeline(COHORTS, (*early, span(0, "wo", 2, 100.0), slow), 100.0, (), 0)
    assert played.parts_us("wo") == {"wait": 1.0, "read": 1.0, "fold": 1.0, "epilogue": 1.0}
    assert Timeline(((0,), (1, 2)), played.spans, 100.0, (), 0).parts_us("wo") == {"wait": 9.0, "read": 0.5, "fold": 2.0, "epilogue": 1.0}


def test_of_measured_iterations_the_median_counts():
    late = [s._replace(signalled=s.signalled + 3) if (s.phase, s.iteration) == ("attention", 4) else s for s in spans(5)]
    out = observed(tiny(5), COHORTS, late)
    assert dict(out.phase_us) == {"map": 10.0} | dict.fromkeys(LOOP, 4.0) | {"embed": 7.0}
    assert (out.us, out.events) == (10 + 50 + 4 * 20 + 7, 0)


def test_it_prints_as_one_line():
    assert repr(timeline(tiny(4), (1, 4, 1), COHORTS, spans(4), 99)) == "<Timeline of 127.0 us: 7 phases, 2 cohorts of workers, 44 spans>"


def test_a_trace_of_a_schedule_shows_every_worker_once_at_a_time():
    gpu = profile("h200")
    played = simulate(tiny(), found(tiny(), 1, gpu), gpu)
    ends: dict[int, float] = {}
    for s in sorted(played.spans, key=lambda s: s.arrived):
        for worker in played.cohorts[s.cohort]:
            assert s.arrived >= ends.get(worker, 0.0)
            ends[worker] = s.signalled
    assert sorted(w for cohort in played.cohorts for w in cohort) == list(range(gpu.workers))
