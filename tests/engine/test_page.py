"""The page of `mkdsl explain --html`, as text: one file that holds everything. `test_page_in_chromium.py` looks at it."""

import json
import re
from typing import Any

import pytest
from found import found
from oracle.graphs import parallel, tiny
from stamps import stamped

from mkdsl.engine._page import page
from mkdsl.schedule import awaited, profile
from mkdsl.simulate import simulate

H200 = profile("h200")


def data_of(html: str) -> Any:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)
    return json.loads(text)


def unpacked(cohorts: list[Any]) -> dict[tuple[int, int], list[int]]:
    """(worker, step) -> five moments, nanoseconds."""
    out = {}
    for workers, numbers in cohorts:
        step = now = 0
        for at in range(0, len(numbers), 6):
            step += numbers[at]
            moments = [now := now + took for took in numbers[at + 1 : at + 6]]
            out |= {(worker, step): moments for worker in workers}
    return out


@pytest.fixture(scope="module")
def html() -> str:
    return page("tiny", tiny(), found(tiny(), 3, H200), H200)


def test_it_is_one_file_that_fetches_nothing(html: str):
    assert html.startswith("<!doctype html>") and html.rstrip().endswith("</html>")
    assert not re.search(r"https?:|\bsrc=|@import|url\(|<link (?!rel=\"icon\" href=\"data:,\")|\bfetch\(|XMLHttpRequest|\bimport\(", html)
    assert "default-src 'none'" in html
    assert not re.search(r"/\* [\w.]+ \*/", html), "a part is missing"


def test_it_has_every_span_of_every_worker(html: str):
    graph, schedule = tiny(), found(tiny(), 3, H200)
    played, data = simulate(graph, schedule, H200, whole=True), data_of(html)
    steps = [(data["phases"][p]["name"], i) for s in data["segments"] for i in range(s["repeats"]) for p in s["phases"]]
    got = {(w, *steps[step]): moments for (w, step), moments in unpacked(data["timelines"][0]["cohorts"]).items()}
    want = {(w, s.phase, s.iteration): s[3:] for s in played.spans for w in played.cohorts[s.cohort]}
    assert set(got) == set(want)
    assert all(got[key] == pytest.approx([1000 * us for us in want[key]], abs=0.51) for key in want)


@pytest.mark.parametrize("graph", [tiny(), parallel()], ids=["tiny", "parallel"])
def test_who_waits_for_whom(graph):
    """In the schedule's own order, where the graph leaves it open."""
    schedule = found(graph, 1, H200)
    data, graph = data_of(page("a model", graph, schedule, H200, alternatives=False)), graph.in_order(schedule.order)
    assert [p["name"] for p in data["phases"]] == list(schedule.order)
    for p in data["phases"]:
        waits = [(data["phases"][at]["name"], when) for at, when in p["waits"]]
        assert waits == [(w, awaited(graph, graph.phase(p["name"]), graph.phase(w)).name) for w in schedule.plan(p["name"]).waits]


def test_it_has_what_the_report_says(html: str):
    data, schedule = data_of(html), found(tiny(), 3, H200)
    assert (data["model"], data["summary"]["target"], data["summary"]["batch"], data["summary"]["context"]) == ("tiny", "h200", 3, 128)
    assert data["summary"]["us"] == schedule.predicted_us and data["summary"]["smem_peak"] == schedule.smem_bytes
    whole = sum(each * depth for _, each, depth, at in data["memory"] if at < 0)
    peaks = [whole + sum(each * depth for _, each, depth, at in data["memory"] if at == i) for i in range(len(data["phases"]))]
    assert max(peaks) == schedule.smem_bytes
    assert len(data["second"]) > 6 and not any(us < 0 and not why for _, _, us, why in data["second"])


def test_a_measurement_is_a_second_timeline():
    schedule = found(tiny(), 3, H200)
    data = data_of(
        page("tiny", tiny(), schedule, H200, measured=stamped(tiny(), schedule, H200, 2.0), device="NVIDIA H200", alternatives=False)
    )
    predicted, measured = data["timelines"]
    assert (predicted["name"], measured["name"], data["device"]) == ("predicted", "measured", "NVIDIA H200")
    assert measured["us"] == pytest.approx(2 * predicted["us"], rel=0.02)
    assert [a["bytes_us"] for a in measured["accounts"]] == [a["bytes_us"] for a in predicted["accounts"]]
    assert data["second"] == []


def test_no_name_ends_the_element_that_the_data_is_in():
    name = "</script><script>alert(1)</script>"
    html = page(name, tiny(), found(tiny(), 3, H200), H200, alternatives=False)
    assert data_of(html)["model"] == name and "<script>alert" not in html


def test_it_is_small_even_for_deep_models():
    """With a measurement, in which no two SMs are alike, each of its 132 x 28 x 5 boxes takes some 25 characters; of predictions those of a cohort are one."""
    graph = tiny(28)
    schedule = found(graph, 1, H200)
    html = page("deep", graph, schedule, H200, measured=stamped(graph, schedule, H200), alternatives=False)
    predicted, measured = (json.dumps(t, separators=(",", ":")) for t in data_of(html)["timelines"])
    assert len(predicted) < 100_000 and len(measured) < 700_000 and len(html) < 900_000
