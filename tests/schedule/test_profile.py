"""Hardware as data, the shared-memory model, the cost model's laws, and the report."""

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle.graphs import llama_1b, llama_8b, tiny

from mkdsl.schedule import PROFILES, Profile, SharedMemory, profile, shared_memory
from mkdsl.search import explain
from mkdsl.search._candidates import chunks_of
from mkdsl.search._cost import Cost, advance, floor_us
from mkdsl.schedule._profile import interpolate
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


def test_launches_in_clusters():
    """An H200 holds 66 clusters of 2; those that were measured 30 of 4, which leave 12 SMs idle. With an odd number of SMs one is left."""
    both = dataclasses.replace(H200, clusters=((2, 0, 1.0), (4, 12, 0.94)))
    assert [(p.workers, p.sizes, p.launched(max(p.sizes)) == p) for p in H200.launches] == [(132, (1, 2), True)]
    assert [(p.workers, p.sizes, p.launched(max(p.sizes)) == p) for p in both.launches] == [(132, (1, 2), True), (120, (1, 4), True)]
    assert both.launched(1) == both and both.launched(4).bandwidth < both.bandwidth
    assert [(p.workers, p.sizes) for p in dataclasses.replace(H200, workers=5).launches] == [(5, (1,)), (4, (1, 2))]
    older = dataclasses.replace(H200, capability=(8, 0))
    assert [(p.workers, p.sizes) for p in (*profile("l20").launches, *older.launches)] == [(92, (1,)), (132, (1,))]
    with pytest.raises(ValueError, match="h200 holds no clusters of 3"):
        H200.launched(3)


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_profiles_go_through_json(name):
    assert Profile.from_json(json.loads(json.dumps(PROFILES[name].to_json()))) == PROFILES[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 132.5}, "profile: workers is 132.5, not int"),
        ({"workers": True}, "profile: workers is True, not int"),
        ({"bandwidth": "fast"}, "profile: bandwidth is 'fast', not a number"),
        ({"bandwidth": 0}, "profile: bandwidth is 0"),
        ({"prologue_us": float("nan")}, "profile: prologue_us is nan, negative or not finite"),
        ({"drift": -0.1}, "profile: drift is -0.1, negative or not finite"),
        ({"capability": [9]}, "profile: capability has 1 items, not 2"),
        ({"stream": []}, "profile: stream: (x, y) points with ascending x"),
        ({"stream": {"8": 0.3}}, "profile: stream is {'8': 0.3}, not a list"),
        ({"handoff": [[32, 1.0], [8, 2.0]]}, "profile: handoff: (x, y) points with ascending x"),
        ({"handoff": [[32, 1.0], [40, "?"]]}, "profile: handoff[1][1] is '?', not a number"),
        ({"clusters": [[1, 0, 1.0]]}, "profile: clusters are (2 to 8 CTAs"),
        ({"clusters": [[2, 0, 1.0], [2, 4, 0.5]]}, "profile: clusters are (2 to 8 CTAs"),
        ({"clusters": [[2, 0, 0.0]]}, "profile: clusters are (2 to 8 CTAs"),
        ({"colour": "green"}, "profile: unknown colour"),
    ],
)
def test_what_is_no_profile(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Profile.from_json(H200.to_json() | changes)


def test_profiles_by_path(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(H200.to_json() | {"name": "mine", "measured": ["bandwidth"]}))
    assert (profile(str(path)).name, profile(str(path)).measured) == ("mine", ("bandwidth",))
    for text, message in (("{", "is no JSON"), ("[]", "a JSON object is needed"), ("{}", "missing attention_us, bandwidth")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"mine.json:? {message}"):
            profile(str(path))
    with pytest.raises(ValueError, match=r"no GPU profile .*No such file"):
        profile(str(tmp_path / "other.json"))


def test_measured_hand_offs():
    assert [interpolate(H200.handoff, x) for x in (0, 32, 64, 160, 999)] == [1.0, 1.6, 2.9, 4.9, 4.9]
    assert [interpolate(H200.released, x) for x in (0, 32, 64)] == [1.4, 2.9, 4.6]
    assert interpolate(H200.handoff, 56) == pytest.approx(2.55)


@pytest.mark.parametrize(
    ("piece", "stage", "chunks"),
    [(256, 32768, [256]), (1024, 32768, [256]), (1024, 16384, [128]), (576, 32768, [64]), (576, 36864, [192]), (288, 24576, [96]),
     (144, 36864, [144]), (1792, 28672, [128, 224]), (448, 28672, [64, 224]), (48, 32768, [16]), (16, 32768, [16]), (8, 32768, [])],
)  # fmt: skip
def test_chunks(piece, stage, chunks):
    assert chunks_of(piece, stage) == chunks


def test_shared_memory_of_llama_1b():
    """By hand: 8 columns x 1024 x bf16 of wd's resident, (64 + 1) x 8 x f32 from each of a pair of attention's, 2 matrices x 8 tiles x 64 rows x f32, and so on."""
    schedule = find(llama_1b(), 1, H200, "data")
    memory = shared_memory(llama_1b(), schedule.phases, padded_batch=1, stages=schedule.stages, stage_bytes=schedule.stage_bytes)
    sizes = {(e.phase, e.name): (e.bytes, e.depth) for e in memory.extents if e.phase not in ("wq+wk+wv", "embed")}
    assert sizes == {
        ("", "ring"): (16384, 12), ("", "statistics"): (2048, 1), ("", "tasks"): (2048, 1), ("", "exchange"): (1024, 1),
        ("", "scratch"): (2048, 1), ("", "barriers"): (2 * 12 * 8, 1), ("", "reserve"): (2880, 1),
        ("attention", "queries"): (1024, 1), ("attention", "scores"): (2048, 1), ("attention", "result"): (2048, 1),
        ("attention", "own scores"): (1024, 1), ("attention", "own k, v"): (1024, 1), ("attention", "received"): (5120, 1),
        ("wo", "resident"): (4096, 1), ("wo", "finished"): (1024, 1), ("wo", "added"): (1024, 1),
        ("wg·wu", "resident"): (4096, 1), ("wg·wu", "finished"): (4096, 1),
        ("wd", "resident"): (16384, 1), ("wd", "finished"): (1024, 1), ("wd", "added"): (1024, 1),
    }  # fmt: skip
    assert (memory.peak, memory.total) == ("wd", schedule.smem_bytes)
    assert memory.total <= H200.smem_bytes and memory.allocated == memory.total - 2880


def test_the_peak_is_the_phase_with_the_most_of_its_own():
    schedule = find(llama_8b(), 8, H200, "data")
    ring = {"padded_batch": 8, "stages": schedule.stages, "stage_bytes": schedule.stage_bytes}
    tasks = 1024 * (schedule.cluster - 1)  # of the cluster's other workers: kept for the whole kernel if any phase is shared
    memory = shared_memory(llama_8b(), schedule.phases, **ring)

    def kept(memory: SharedMemory) -> int:
        return sum(e.total for e in memory.extents if e.name.startswith("kept"))

    each = {p: shared_memory(llama_8b(), [p], **ring) for p in schedule.phases}
    alone = {p.name: m.total - kept(m) + kept(memory) + tasks * (p.cluster == 1) for p, m in each.items()}
    assert {name: memory.bytes_in(name) for name in alone} == alone
    assert max(alone, key=lambda name: alone[name]) == memory.peak
    assert max(alone.values()) == memory.total == schedule.smem_bytes


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
        "shared memory of a worker, over the schedule:",
        "ring: ",
        "fence",
        "hand-off",
        "bound by",
        "what came second (us more a step):",
        ", the peak",
    ):
        assert want in text
    assert re.search(r"predicted: \d+ us a step; floor \d+ us \(streamed bytes at 4.61 TB/s\)", text)
    rows = [line for line in text.splitlines() if re.match(r"  (map|wq\+wk\+wv|attention|wo|wg·wu|wd|embed) ", line)]
    assert len(rows) >= 2 * 7  # what was chosen, and where time goes
    assert str(schedule).startswith("h200, batch 3: ") and "wd: " in str(schedule)
