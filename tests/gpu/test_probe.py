"""The probe without a GPU: what its numbers mean, that wrong data is noticed, and that its kernels lower and assemble."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mkdsl.gpu import _probe, assemble, comparison, gpu_at_hand, probe, write_profile
from mkdsl.gpu._probe_fit import MEASURED, Gpu, Measured, build_profile, round_us, slope, span_us
from mkdsl.gpu._probe_kernels import AGAIN, ARRIVED, BLOCK, COLUMNS, ENDED, MOST, ROUNDS, STARTED, WARM, handoff, stream
from mkdsl.schedule import PROFILES, Profile, profile

H200 = Gpu("NVIDIA H200", (9, 0), 132)
MADE = Measured(
    stream=((8, 1.5e12), (32, 4.25e12), (64, 4.6123e12)),
    handoff=((0, 1.04321), (32, 1.5)),
    released=((0, 1.4), (32, 2.9)),
    reads=((8192, 1.5), (16384, 1.9), (32768, 2.7)),
)


def results(starts, ends, arrived=1, again=0):
    rows = np.zeros((len(starts), COLUMNS), np.int64)
    rows[:, STARTED], rows[:, ENDED], rows[:, ARRIVED], rows[:, AGAIN] = starts, ends, arrived, again
    return rows.astype(np.uint32).astype(np.int32)  # as the timer wraps


def test_spans_and_rounds_when_the_timer_wraps():
    near = 2**32 - 500
    assert span_us(results([near, near + 100, near - 100], [near + 1000, near + 900, near + 800])) == pytest.approx(1.1)
    took = 1500 * (ROUNDS - WARM)
    assert round_us(results([near, near, near + 7], [near + took, near + took, near + took])) == pytest.approx(1.5)


def test_slope():
    assert slope(MADE.reads) == pytest.approx(0.4 / 8192)
    with pytest.raises(RuntimeError, match="probe: times do not rise"):
        slope(((8192, 1.5), (16384, 1.25)))


def test_the_nearest_profile():
    assert H200.nearest().name == "h200"
    assert Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132).nearest().name == "h100"
    assert Gpu("NVIDIA GH200 480GB", (9, 0), 132).nearest().name == "h200"
    assert Gpu("NVIDIA B300", (10, 3), 148).nearest().name == "h200"
    assert Gpu("NVIDIA GB200", (10, 0), 148).nearest().name == "b200"
    assert Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132).slug() == "nvidia-h100-80gb-hbm3"


def test_a_profile_of_what_was_measured():
    made = build_profile(dataclasses.replace(H200, workers=114), MADE, "Mine")
    assert (made.name, made.workers, made.bandwidth, made.measured) == ("mine", 114, 4.612e12, MEASURED)
    assert made.stream == ((8, 0.3252), (32, 0.9214), (64, 1.0))
    assert made.handoff == ((0, 1.043), (32, 1.5)) and made.released == MADE.released
    assert made.l2_rate == pytest.approx(8192 / 0.4e-6, rel=1e-3)
    kept = {f.name for f in dataclasses.fields(Profile)} - {*MEASURED, "name", "measured"}
    assert all(getattr(made, name) == getattr(PROFILES["h200"], name) for name in kept)
    table = {row[0]: row[1:] for row in comparison(made, PROFILES["h200"])}
    assert table["device memory, TB/s"] == ("4.61", "4.61")
    assert table["hand-off, us, 32 KiB in flight"] == ("1.5", "1.6")


def test_a_written_profile_is_a_target(tmp_path):
    made = build_profile(H200, MADE, "mine")
    path = write_profile(made, tmp_path / "deep" / "mine.json")
    assert profile(str(path)) == made
    assert json.loads(path.read_text())["measured"] == list(MEASURED)


def test_where_profiles_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert write_profile(build_profile(H200, MADE, "mine")) == tmp_path / "mkdsl" / "profiles" / "mine.json"


# Measuring, with kernels that only pretend.


@pytest.fixture
def pretend(monkeypatch):
    """Kernels in plain numpy on a GPU with 3 workers; a test may set what they get wrong."""
    wrong = types.SimpleNamespace(stale=0, absent=0, again=0)

    def stream(workers, units):
        def run(source, window):
            landed = np.zeros((workers, MOST, *BLOCK), np.int32)
            for i in range(units):
                for w in range(workers):
                    landed[w, i % window[0]] = source[(i * workers + w) % source.shape[0]]
            landed[0, 0, 3, 5] += wrong.stale
            took = 1000 + units * workers * 8192 // min(window[0], 5)
            return jnp.asarray(results([0] * workers, [took] * workers).ravel()), jnp.asarray(landed)

        return run

    def handoff(workers, kib, *, release):
        def run(source, window):
            took = (1000 + 40 * kib + 50 * int(window[0]) + 400 * release) * (ROUNDS - WARM)
            return jnp.asarray(results([0] * workers, [took] * workers, 1 - wrong.absent, wrong.again).ravel())

        return run

    monkeypatch.setattr(_probe, "kernels", types.SimpleNamespace(stream=stream, handoff=handoff))
    monkeypatch.setattr(_probe, "SOURCE", 37 * 8192)
    monkeypatch.setattr(_probe, "STREAMED", 100 * 8192)
    return wrong


@pytest.mark.medium
def test_probing(pretend):
    said = []
    made = probe(dataclasses.replace(H200, workers=3), report=said.append)
    assert made.name == "nvidia-h200" and len(said) == 4
    assert made.stream[-1] == (160, 1.0) and made.stream[0][1] == pytest.approx(0.2, rel=0.03)
    assert made.handoff[0] == (0, 1.32) and made.released[0] == (0, 1.72) and made.handoff[-1] == (160, 2.32)
    assert made.l2_rate == pytest.approx(1024 / 40e-9, rel=1e-3)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("stale", "the stream read wrong data, with 1 units in flight"),
        ("absent", "a hand-off never arrived at 3 of 3 workers"),
        ("again", "data was missing behind a release/acquire counter, 3 times"),
    ],
)
def test_wrong_data_is_no_measurement(pretend, what, message):
    setattr(pretend, what, 1)
    with pytest.raises(RuntimeError, match=message):
        probe(dataclasses.replace(H200, workers=3), report=lambda _: None)


def test_no_gpu(monkeypatch):
    with pytest.raises(RuntimeError, match="no GPU: jax's backend is 'cpu'"):
        gpu_at_hand()
    ada = types.SimpleNamespace(compute_capability="8.9", device_kind="NVIDIA L20", core_count=92)
    monkeypatch.setattr(_probe, "require_gpu", lambda: None)
    monkeypatch.setattr(jax, "devices", lambda: [ada])
    with pytest.raises(RuntimeError, match=r"^no GPU: .* needs compute capability 9.0 or later; NVIDIA L20 is 8.9"):
        gpu_at_hand()
    monkeypatch.setattr(ada, "compute_capability", "9.0")
    assert gpu_at_hand() == Gpu("NVIDIA L20", (9, 0), 92)


# The kernels themselves.

ARGUMENTS = (jax.ShapeDtypeStruct((_probe.SOURCE // 8192, *BLOCK), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32))
KERNELS = {
    "stream": lambda: stream(132, 3972),
    "relaxed": lambda: handoff(132, 8, release=False),
    "released": lambda: handoff(132, 8, release=True),
    "32 KiB": lambda: handoff(132, 32, release=False),
    "more workers than shares": lambda: handoff(148, 8, release=False),
    "fewer": lambda: handoff(78, 16, release=False),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_lower(name):
    jax.export.export(jax.jit(KERNELS[name]()), platforms=["cuda"])(*ARGUMENTS)


@pytest.mark.medium
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_assemble(name):
    (kernel,) = assemble(KERNELS[name](), *ARGUMENTS)
    print(f"{name}: {kernel}")
    assert kernel.spill_bytes == 0
    assert 114 * 1024 < kernel.smem_bytes <= 227 * 1024  # one CTA per SM
