"""What the search tells of a schedule, and what else could have been chosen."""

import dataclasses
import re
from collections.abc import Callable

import pytest
from found import found
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LAW
from oracle.graphs import graphs, llama_1b, tiny
from oracle.sources import with_workers

from mkdsl.graph import OpGraph
from mkdsl.schedule import Handoff, Profile, profile
from mkdsl.search import BOUNDS, Account, Alternative, Summary, accounts, explain, runners_up, summary
from mkdsl.search._alternatives import _told, next_best, next_handoffs
from mkdsl.search._report import _table
from mkdsl.search._search import find
from mkdsl.simulate import simulate

H200 = profile("h200")
PHASES = ("map", "wq+wk+wv", "attention", "wo", "wg·wu", "wd", "embed")


@pytest.fixture(scope="module")
def text() -> str:
    return explain(tiny(), found(tiny(), 3, H200), H200)


def summarised() -> Summary:
    graph, schedule = tiny(), found(tiny(), 3, H200)
    return summary(graph, schedule, H200, accounts(graph, schedule, H200, simulate(graph, schedule, H200)))


def test_it_begins_with_a_summary(text: str):
    head, *lines = text.splitlines()[:5]
    assert head == "h200: batch 3 (padded to 4), context 128, 132 workers, each an SM of its own"
    schedule = found(tiny(), 3, H200)
    assert [line.split()[0] for line in lines] == ["time", "floor", "bound", "shared"]
    assert lines[0].startswith(f"  time           {schedule.predicted_us:.0f} us a step, predicted; ")
    assert re.fullmatch(r"  floor          \d+ us: [\d.]+ MB a step at 4.61 TB/s", lines[1])
    assert f" of 227 KiB at the peak, in {summarised().memory.peak}; the ring is {schedule.num_stages} stages" in lines[3]


def test_it_names_the_model():
    named = explain(tiny(), found(tiny(), 3, H200), H200, alternatives=False, model="tiny")
    assert named.startswith("tiny on h200: batch 3 ")


def test_words_that_tables_use_are_explained(text: str):
    legend = text.split("words (")[1].split("what was decided")[0]
    for word in ("phase", "hand-off", "runs", "items", "bytes us", "compute us", "bound by", "wait", "epilogue", "slots", "splits"):
        assert word in legend
    assert all(len(line) <= 170 for line in legend.splitlines())


@pytest.mark.parametrize(
    "heading",
    [
        "words (",
        "what was decided:",
        "what crosses phases:",
        "where time goes, as predicted:",
        "what came second (us more a step, all else as it is;",
        "shared memory of a worker",
    ],
)
def test_each_part_has_a_heading(text: str, heading: str):
    assert len([line for line in text.splitlines() if line.startswith(heading)]) == 1


def test_what_was_chosen_of_each_phase_and_where_its_time_goes(text: str):
    for name in PHASES:
        rows = re.findall(rf"^  {re.escape(name)} +\S.*$", text, re.MULTILINE)
        assert len(rows) >= 2, name
        assert f" {1 if name in ('map', 'embed') else 5} x  " in rows[0]
    schedule = found(tiny(), 3, H200)
    assert all(schedule.plan(name).tiling in text for name in PHASES)
    assert f"the ring is {schedule.num_stages} stages of {schedule.stage_bytes // 1024} KiB, {schedule.max_in_flight} in flight" in text


def test_hand_offs_of_each_tensor(text: str):
    rows = dict(re.findall(r"^  (\S+) +(sentinel|release-acquire|output) +\d+ +\d+ +\w+$", text, re.MULTILINE))
    schedule = found(tiny(), 3, H200)
    assert rows == {t.name: "output" if t.name == "embed.out" else str(t.handoff) for t in schedule.tensors}


def test_what_was_measured_stands_beside():
    schedule = found(tiny(), 3, H200)
    half = dataclasses.replace(simulate(tiny(), schedule, H200), us=schedule.predicted_us / 2)
    text = explain(tiny(), schedule, H200, alternatives=False, measured=half)
    assert re.search(r"^  measured       \d+ us, in the kernel with stamps; predicted \+100.0%$", text, re.MULTILINE)
    assert "where time went, by the kernel's own stamps:" in text


def test_without_alternatives(text: str):
    short = explain(tiny(), found(tiny(), 3, H200), H200, alternatives=False)
    assert "what came second" not in short and len(short) < len(text)


@pytest.mark.medium
@settings(LAW, max_examples=20)
@given(graphs(), st.integers(1, 12), st.integers(1, 8), st.sampled_from(Handoff))
def test_of_any_graph(graph: OpGraph, workers: int, batch: int, handoff: Handoff):
    gpu = with_workers(workers)
    schedule = find(graph, batch, gpu, handoff)
    text = explain(graph, schedule, gpu)
    assert f"{schedule.predicted_us:.0f} us a step, predicted" in text
    second = text.split("what came second")[1].split("shared memory of")[0]
    unexplained = re.findall(r" -\d+\.\d$", second, re.MULTILINE)
    assert not unexplained, second


# What else could have been chosen.


@pytest.mark.parametrize(("model", "gpu"), [(llama_1b, H200), (tiny, with_workers(6))], ids=["llama-1b", "tiny"])
def test_the_next_best_of_a_phase_is_another_and_no_cheaper(model: Callable[[], OpGraph], gpu: Profile):
    second = list(next_best(model(), found(model(), 1, gpu), gpu))
    assert {a.of for a in second} <= set(PHASES) and len(second) >= 6
    assert all(a.what and a.us > -1e-6 for a in second)


def test_what_the_simulator_overruled_says_so():
    """One phase in the cost model's second best way, as if the simulator had preferred it: the best is now an alternative, with a number below zero."""
    graph, schedule = llama_1b(), found(llama_1b(), 1, H200)
    worse = schedule.plan("attention")
    changed = dataclasses.replace(worse, splits=worse.splits * 2, cluster=1)
    other = dataclasses.replace(schedule, phases=tuple(changed if p.name == "attention" else p for p in schedule.phases))
    (back,) = (a for a in runners_up(graph, other, H200) if a.of == "attention" and "splits" in a.what)
    assert back.us < 0 and back.why == "by the cost model; the simulator, which decides, preferred the chosen"


def test_a_hand_off_that_the_search_was_told_not_to_choose_says_so():
    schedule = found(tiny(), 3, H200, Handoff.RELEASE_ACQUIRE)
    faster = [a for a in runners_up(tiny(), schedule, H200) if a.shown_us < 0]
    assert faster and all(a.why == "not tried: the search tries 3 such changes at most" for a in faster)


def test_a_small_gain_is_not_worth_it():
    schedule = found(llama_1b(), 1, H200)
    alike = [Alternative("x", "release-acquire", us) for us in (-0.001, -0.5, -20.0)]
    assert [(_told(a, schedule).shown_us, bool(_told(a, schedule).why)) for a in alike] == [(0.0, False), (-0.5, True), (-20.0, True)]
    assert [_told(a, schedule).why.split(":")[0] for a in alike] == ["", "not worth it", "not tried"]


def test_the_other_hand_off_of_a_tensor_is_no_faster():
    schedule = found(llama_1b(), 1, H200)
    second = list(next_handoffs(llama_1b(), schedule, H200))
    assert {a.of: a.what for a in second}.items() <= {t.name: t.handoff.other for t in schedule.tensors}.items()
    assert second and all(a.us >= 0 for a in second)


# Its words.


@pytest.mark.parametrize(
    ("us", "memory", "compute", "want"),
    [(10.0, 9.0, 9.5, "bytes"), (10.0, 5.0, 9.0, "compute"), (10.0, 5.0, 6.0, "hand-off"), (0.0, 0.0, 0.0, "bytes")],
)
def test_what_bounds_a_phase(us: float, memory: float, compute: float, want: str):
    account = Account("p", 1, 0, us, memory, compute, {})
    assert (account.bound, account.exposed_us) == (want, us - max(memory, compute))
    assert sum(map(account.explained_us, BOUNDS)) == us
    assert account.explained_us("bytes" if memory >= compute else "compute") == max(memory, compute)


def test_bytes_that_were_there_before_explain_no_more_than_all():
    account = Account("p", 1, 0, 6.5, 7.3, 2.2, {})
    assert [account.explained_us(b) for b in BOUNDS] == [6.5, 0.0, 0.0]


def test_all_time_is_bound_by_something():
    about = summarised()
    assert sorted(name for _, of in about.bounds.values() for name in of) == sorted(PHASES)
    timeline = simulate(tiny(), found(tiny(), 3, H200), H200)
    runs = {p.name: tiny().iterations(p) for p in tiny().phases}
    assert sum(us for us, _ in about.bounds.values()) == pytest.approx(sum(runs[name] * us for name, us in timeline.phase_us))
    assert about.floor_us == pytest.approx(about.streamed / about.bandwidth * 1e6)


def test_numbers_stand_to_the_right():
    assert _table([("a", ">bb", "c"), ("long", "1", "text")]) == ["  a     bb  c", "  long   1  text"]
