"""What the probe's numbers mean: from timestamps to microseconds, from curves to a profile. No GPU here."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from mkdsl.gpu._device import built_in
from mkdsl.gpu._probe_kernels import ENDED, ROUNDS, STARTED, WARM
from mkdsl.schedule import PROFILES, Curve, Profile, interpolate

MEASURED = ("workers", "capability", "bandwidth", "stream", "l2_rate", "handoff", "released")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The GPU at hand, as JAX names it: "NVIDIA H200", (9, 0), 132 streaming multiprocessors."""

    kind: str
    capability: tuple[int, int]
    workers: int

    def nearest(self) -> Profile:
        """The built-in profile of this name, or else of this capability, or else the H200."""
        alike = [name for name, p in PROFILES.items() if p.capability == self.capability]
        return PROFILES[built_in(self.kind) or next(iter(alike), "h200")]

    def slug(self) -> str:
        """A name for a file: "nvidia-h200"."""
        return re.sub(r"[^a-z0-9]+", "-", self.kind.lower()).strip("-")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the kernels said, as (x, y) points.

    Attributes:
      stream: KiB in flight per worker, bytes/s of all workers together.
      handoff, released: KiB in flight per worker, microseconds of a hand-off of 8 KiB: relaxed, and with release and acquire.
      reads: bytes that every worker reads in a hand-off, microseconds of it, relaxed and under the stream.
    """

    stream: Curve
    handoff: Curve
    released: Curve
    reads: Curve


def build_profile(gpu: Gpu, measured: Measured, name: str) -> Profile:
    """The measured fields, beside those of the nearest built-in profile.

    Raises:
      RuntimeError: reading more did not take longer, so there is no L2 rate in `measured.reads`.
    """
    bandwidth = max(y for _, y in measured.stream)
    return dataclasses.replace(
        gpu.nearest(),
        name=name.lower(),
        capability=gpu.capability,
        workers=gpu.workers,
        bandwidth=_digits(bandwidth),
        stream=tuple((x, _digits(y / bandwidth)) for x, y in measured.stream),
        l2_rate=_digits(1e6 / slope(measured.reads)),
        handoff=tuple((x, _digits(y)) for x, y in measured.handoff),
        released=tuple((x, _digits(y)) for x, y in measured.released),
        measured=MEASURED,
    )


def _digits(x: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{x:.3e}")


def slope(curve: Curve) -> float:
    """Of the least-squares line through the points.

    Raises:
      RuntimeError: it does not rise.
    """
    x, y = np.array(curve).T
    rise = float(np.polyfit(x, y, 1)[0])
    if rise <= 0:
        raise RuntimeError(f"probe: times do not rise with what is read: {curve}")
    return rise


def span_us(results: np.ndarray) -> float:
    """Microseconds from the first worker's start to the last one's end; results int32 [workers, COLUMNS], nanoseconds modulo 2^32."""
    since = results - results[0, STARTED]  # wraps like the timer
    return float(since[:, ENDED].max() - since[:, STARTED].min()) / 1e3


def round_us(results: np.ndarray) -> float:
    """Microseconds of a timed hand-off, median over workers; results as for `span_us`."""
    return float(np.median(results[:, ENDED] - results[:, STARTED])) / 1e3 / (ROUNDS - WARM)


def comparison(profile: Profile, built_in: Profile) -> list[tuple[str, str, str]]:
    """Rows (constant, measured value, value in a built-in profile) for a table."""
    rows = [
        ("device memory, TB/s", f"{profile.bandwidth / 1e12:.2f}", f"{built_in.bandwidth / 1e12:.2f}"),
        ("L2 under the stream, GB/s of a worker", f"{profile.l2_rate / 1e9:.1f}", f"{built_in.l2_rate / 1e9:.1f}"),
    ]
    curves: Sequence[tuple[str, Curve, Curve]] = (
        ("stream reached", profile.stream, built_in.stream),
        ("hand-off, us", profile.handoff, built_in.handoff),
        ("released hand-off, us", profile.released, built_in.released),
    )
    return rows + [
        (f"{what}, {x:g} KiB in flight", f"{y:.3g}", f"{interpolate(before, x):.3g}") for what, curve, before in curves for x, y in curve
    ]
