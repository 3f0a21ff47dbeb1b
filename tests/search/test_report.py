"""What the search tells of a schedule, and what else could have been chosen."""

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
from mkdsl.search import explain
from mkdsl.search._alternatives import next_best, next_handoffs
from mkdsl.search._report import _bound, _table
from mkdsl.search._search import find

H200 = profile("h200")
PHASES = ("map", "wq+wk+wv", "attention", "wo", "wg·wu", "wd", "embed")


@pytest.fixture(scope="module")
def text() -> str:
    return explain(tiny(), found(tiny(), 3, H200), H200)


def test_the_head_says_what_is_decoded_where(text: str):
    assert text.splitlines()[0] == "h200, batch 3 (padded to 4), 132 workers"


@pytest.mark.parametrize(
    "heading",
    [
        "what was decided (",
        "ring: ",
        "what crosses phases (",
        "where time goes (",
        "what came second (us more a step)",
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
    assert f"ring: {schedule.num_stages} stages of {schedule.stage_bytes // 1024} KiB, {schedule.max_in_flight} in flight" in text


def test_hand_offs_of_each_tensor(text: str):
    rows = dict(re.findall(r"^  (\S+) +(sentinel|release-acquire|output) +\d+ +\d+ +\w+$", text, re.MULTILINE))
    schedule = found(tiny(), 3, H200)
    assert rows == {t.name: "output" if t.name == "embed.out" else str(t.handoff) for t in schedule.tensors}


def test_the_last_line_is_the_prediction(text: str):
    assert re.fullmatch(r"predicted: \d+ us a step; floor \d+ us \(streamed bytes at 4.61 TB/s\)", text.splitlines()[-1])


def test_without_alternatives(text: str):
    short = explain(tiny(), found(tiny(), 3, H200), H200, alternatives=False)
    assert "what came second" not in short and len(short) < len(text)


@pytest.mark.medium
@settings(LAW, max_examples=20)
@given(graphs(), st.integers(1, 12), st.integers(1, 8), st.sampled_from(Handoff))
def test_of_any_graph(graph: OpGraph, workers: int, batch: int, handoff: Handoff):
    gpu = with_workers(workers)
    schedule = find(graph, batch, gpu, handoff)
    assert f"predicted: {schedule.predicted_us:.0f} us a step" in explain(graph, schedule, gpu)


# What else could have been chosen.


@pytest.mark.parametrize(("model", "gpu"), [(llama_1b, H200), (tiny, with_workers(6))], ids=["llama-1b", "tiny"])
def test_the_next_best_of_a_phase_is_another_and_no_cheaper(model: Callable[[], OpGraph], gpu: Profile):
    second = list(next_best(model(), found(model(), 1, gpu), gpu))
    assert {a.of for a in second} <= set(PHASES) and len(second) >= 6
    assert all(a.what and a.us > -1e-6 for a in second)


def test_the_other_hand_off_of_a_tensor_is_no_faster():
    schedule = found(llama_1b(), 1, H200)
    second = list(next_handoffs(llama_1b(), schedule, H200))
    assert {a.of: a.what for a in second}.items() <= {t.name: t.handoff.other for t in schedule.tensors}.items()
    assert second and all(a.us >= 0 for a in second)


# Its words.


@pytest.mark.parametrize(
    ("us", "memory", "compute", "want"),
    [(10.0, 9.0, 9.5, "memory"), (10.0, 5.0, 9.0, "compute"), (10.0, 5.0, 6.0, "latency (4.0 us)"), (0.0, 0.0, 0.0, "memory")],
)
def test_what_bounds_a_phase(us: float, memory: float, compute: float, want: str):
    assert _bound(us, memory, compute) == want


def test_numbers_stand_to_the_right():
    assert _table([("a", ">bb", "c"), ("long", "1", "text")]) == ["  a     bb  c", "  long   1  text"]
