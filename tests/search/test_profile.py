"""Hardware as data, the shared-memory model, the cost model's laws, and the report."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_graphs import llama_1b, llama_8b, tiny

from mkdsl.search import PROFILES, explain, profile, shared_memory
from mkdsl.search._candidates import chunks_of
from mkdsl.search._cost import Cost, advance, floor_us
from mkdsl.search._profile import interpolate
from mkdsl.search._search import find

H200 = profile("H200")


def test_what_is_known_of_gpus():
    assert (H200.workers, H200.bandwidth, H200.smem_bytes, H200.capability) == (132, 4.61e12, 232448, (9, 0))
    assert {n: p.smem_bytes for n, p in PROFILES.items()} == {
        "h200": 232448, "h100": 232448, "b200": 232448, "a100": 166912, "l20": 101376, "l40s": 101376,
    }  # fmt: skip
    assert all(0.5 < p.bandwidth / s < 1 for p, s in zip(PROFILES.values(), (4.8e12, 3.35e12, 2.039e12, 864e9, 864e9, 8e12), strict=True))
    assert [n for n, p in PROFILES.items() if not p.tma] == ["a100", "l20", "l40s"]
    json.dumps([p.to_json() for p in PROFILES.values()])


def test_measured_hand_offs():
    assert [interpolate(H200.handoff, x) for x in (0, 32, 64, 160, 999)] == [1.0, 1.5, 2.8, 4.5, 4.5]
    assert [interpolate(H200.released, x) for x in (0, 32, 64)] == [1.4, 2.9, 4.6]
    assert interpolate(H200.handoff, 56) == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("piece", "stage", "chunks"),
    [(256, 32768, [256]), (1024, 32768, [256]), (1024, 16384, [128]), (576, 32768, [64]), (576, 36864, [192]), (288, 24576, [96]),
     (144, 36864, [144]), (1792, 28672, [128, 224]), (448, 28672, [64, 224]), (48, 32768, [16]), (16, 32768, [16]), (8, 32768, [])],
)  # fmt: skip
def test_chunks(piece, stage, chunks):
    assert chunks_of(piece, stage) == chunks


def test_shared_memory_of_llama_1b():
    """By hand: 8 columns x 512 x bf16 of half of wd's resident, 2 matrices x 8 tiles x 64 rows x f32, and so on."""
    schedule = find(llama_1b(), 1, H200, "data")
    memory = shared_memory(llama_1b(), schedule.phases, padded_batch=1, stages=6, stage_bytes=32768)
    sizes = {e.name: (e.bytes, e.depth) for e in memory.extents}
    assert sizes == {
        "ring": (32768, 6), "resident": (8192, 1), "finished": (4096, 1), "added": (1024, 1),
        "attn queries": (1024, 1), "attn scores": (2048, 1),
        "attn result": (2048, 1), "attn own": (1024, 1), "statistics": (4096, 1), "tasks": (1024, 1), "reserve": (4096, 1),
    }  # fmt: skip
    assert memory.total == schedule.smem_bytes <= H200.smem_bytes


def test_shared_memory_is_the_maximum_over_phases():
    schedule = find(llama_8b(), 8, H200, "data")
    one_by_one = [
        shared_memory(llama_8b(), [p], padded_batch=8, stages=schedule.stages, stage_bytes=schedule.stage_bytes) for p in schedule.phases
    ]
    largest = {}
    for memory in one_by_one:
        for e in memory.extents:
            largest[e.name] = max(largest.get(e.name, 0), e.total)
    assert sum(largest.values()) == schedule.smem_bytes


times = st.floats(0, 50)


@given(st.builds(Cost, times, times, times), times, times, st.floats(1, 30))
def test_more_ahead_is_never_worse(cost, ahead, more, capacity):
    """What the shortest path relies on to drop labels."""
    ahead, more = min(ahead, capacity), min(ahead + more, capacity)
    took, after = advance(cost, ahead, capacity)
    took_more, after_more = advance(cost, more, capacity)
    assert took_more <= took and after_more >= after - 1e-9
    waited = more - ahead
    assert waited + took_more >= took - 1e-9  # and waiting for it gains nothing


def test_floor():
    assert floor_us(llama_1b(), 1, H200) == pytest.approx((2.4716e9 + 16 * 2 * 8 * 512 * 64 * 2) / 4.61e12 * 1e6, rel=1e-3)


def test_report():
    schedule = find(tiny(), 3, H200, "data")
    text = explain(tiny(), schedule, H200)
    for want in (
        "h200, batch 3 (padded to 4), 132 workers",
        "5 x",
        "waits for",
        "shared memory of a worker:",
        "ring: ",
        "fences in: ",
        "wq data x2",
    ):
        assert want in text
    assert re.search(r"predicted: \d+ us a step; floor \d+ us \(streamed bytes at 4.61 TB/s\)", text)
    rows = [line for line in text.splitlines() if re.match(r"  (map|wq\+wk\+wv|attention|wo|wg·wu|wd|embed) ", line)]
    assert len(rows) == 7
    assert str(schedule).startswith("h200, batch 3: ") and "wd: " in str(schedule)
