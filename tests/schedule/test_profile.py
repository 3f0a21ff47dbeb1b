"""A GPU as data: what is known from the start, how it is launched, JSON that somebody edited."""

import dataclasses
import json
import re

import pytest

from mkdsl.schedule import KIB, PROFILES, Profile, interpolate, profile

H200 = profile("H200")


def test_what_is_known_of_gpus():
    assert (H200.workers, H200.bandwidth, H200.smem_bytes, H200.capability) == (132, 4.61e12, 232448, (9, 0))
    assert {n: p.smem_bytes for n, p in PROFILES.items()} == {
        "h200": 232448, "h100": 232448, "b200": 232448, "a100": 166912, "l20": 101376, "l40s": 101376,
    }  # fmt: skip
    assert [n for n, p in PROFILES.items() if not p.tma] == ["a100", "l20", "l40s"]
    assert [n for n, p in PROFILES.items() if "wgmma" in p.instructions] == ["h200", "h100"]


def test_what_is_assumed_of_gpus_that_were_not_measured():
    """As large a fraction of the data sheet's bandwidth as the H200 reaches; all compute by the clock."""
    sheets = {"h100": 3.35e12, "a100": 2.039e12, "l20": 864e9, "l40s": 864e9, "b200": 8e12}
    for name, sheet in sheets.items():
        gpu = PROFILES[name]
        assert gpu.bandwidth / sheet == pytest.approx(H200.bandwidth / 4.8e12)
        times = [f.name for f in dataclasses.fields(Profile) if f.name.endswith("_us") and f.name != "drift_us"]
        assert len(times) > 15
        for field in times:
            assert getattr(gpu, field) * gpu.clock_hz == pytest.approx(getattr(H200, field) * H200.clock_hz), field


def test_launches_in_clusters():
    """An H200 holds 66 clusters of 2; those that were measured 30 of 4, which leave 12 SMs idle. With an odd number of SMs one is left."""
    both = dataclasses.replace(H200, clusters=((2, 0, 1.0), (4, 12, 0.94)))
    assert [(p.workers, p.sizes, p.launched(max(p.sizes)) == p) for p in H200.launches] == [(132, (1, 2), True)]
    assert [(p.workers, p.sizes, p.launched(max(p.sizes)) == p) for p in both.launches] == [(132, (1, 2), True), (120, (1, 4), True)]
    assert both.launched(1) == both
    assert both.launched(4).bandwidth == pytest.approx(0.94 * both.bandwidth)
    assert [(p.workers, p.sizes) for p in dataclasses.replace(H200, workers=5).launches] == [(5, (1,)), (4, (1, 2))]
    older = dataclasses.replace(H200, capability=(8, 0))
    assert [(p.workers, p.sizes) for p in (*profile("l20").launches, *older.launches)] == [(92, (1,)), (132, (1,))]
    with pytest.raises(ValueError, match="h200 holds no clusters of 3"):
        H200.launched(3)


def test_measured_hand_offs():
    assert [interpolate(H200.handoff, x) for x in (0, 32, 64, 160, 999)] == [1.0, 1.6, 2.9, 4.9, 4.9]
    assert [interpolate(H200.released, x) for x in (0, 32, 64)] == [1.4, 2.9, 4.6]
    assert interpolate(H200.handoff, 56) == pytest.approx(2.55)


def test_what_one_worker_fetches():
    """With 160 KiB in flight everywhere its equal share of the bandwidth, with 8 KiB two fifths of that."""
    share = H200.bandwidth / 132 * 1e-6
    assert H200.worker_rate(160 * KIB) == pytest.approx(share)
    assert H200.worker_rate(8 * KIB) == pytest.approx(0.408 * share)


# JSON.


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_profiles_go_through_json(name):
    assert Profile.from_json(json.loads(json.dumps(PROFILES[name].to_json()))) == PROFILES[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 132.5}, "profile: workers is 132.5, not int"),
        ({"bandwidth": "fast"}, "profile: bandwidth is 'fast', not a number"),
        ({"bandwidth": 0}, "profile: bandwidth is 0"),
        ({"prologue_us": float("nan")}, "profile: prologue_us is nan, negative or not finite"),
        ({"stream": []}, "profile: stream: (x, y) points with ascending x"),
        ({"handoff": [[32, 1.0], [8, 2.0]]}, "profile: handoff: (x, y) points with ascending x"),
        ({"released": [[0, 0.0]]}, "profile: released: (x, y) points with ascending x and y above 0"),
        ({"clusters": [[1, 0, 1.0]]}, "profile: clusters are (2 to 8 CTAs"),
        ({"clusters": [[2, 0, 1.0], [2, 4, 0.5]]}, "profile: clusters are (2 to 8 CTAs"),
        ({"clusters": [[2, 0, 0.0]]}, "profile: clusters are (2 to 8 CTAs"),
        ({"turn_us": 1.0}, "profile: unknown turn_us"),
    ],
)
def test_what_is_no_profile(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Profile.from_json(H200.to_json() | changes)


# By name or path.


def test_profiles_by_name():
    assert profile("L20") is PROFILES["l20"]
    with pytest.raises(ValueError, match=re.escape("no GPU profile 'tpu'; there are a100, b200, h100, h200, l20, l40s")):
        profile("tpu")


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
