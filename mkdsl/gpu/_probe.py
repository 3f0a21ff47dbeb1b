"""`mkdsl probe`: measures the constants of the cost model on the GPU at hand. Most of the time is compilation."""

import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from jax import lax

from mkdsl.gpu import _probe_kernels as kernels
from mkdsl.gpu._device import require_gpu
from mkdsl.gpu._probe_fit import Gpu, Measured, build_profile, round_us, span_us
from mkdsl.gpu._probe_kernels import AGAIN, ARRIVED, BLOCK, COLUMNS, KIB, UNIT_KIB, i32
from mkdsl.schedule import Curve, Profile
from mkdsl.search import directory

SOURCE = 1 << 30  # bytes: many times any L2
STREAMED = 4 << 30  # bytes in one launch: about a millisecond
REPEATS = 5
STREAM_WINDOWS = (1, 2, 3, 4, 5, 6, 8, 20)  # units in flight
HANDOFF_WINDOWS = (0, 2, 3, 4, 5, 6, 8, 12, 20)
READ_WINDOW = 4  # units: 32 KiB, half of the usual ring's, which is what a hand-off meets on average
READ_KIB = (8, 16, 32)

Report = Callable[[str], object]


def gpu_at_hand() -> Gpu:
    """The GPU that JAX would use.

    Raises:
      RuntimeError: there is none, or it has no TMA, which the probe streams through.
    """
    require_gpu()
    device = jax.devices()[0]
    major, minor = map(int, str(device.compute_capability).split("."))
    if major < 9:
        raise RuntimeError(
            f"no GPU: the probe streams through TMA and needs compute capability 9.0 or later; {device.device_kind} is {major}.{minor}"
        )
    return Gpu(device.device_kind, (major, minor), device.core_count)


def probe(gpu: Gpu, name: str | None = None, report: Report = print) -> Profile:
    """Measures a GPU; nothing else may be running on it.

    Args:
      gpu: the one at hand.
      name: of the profile, by default after the GPU.
      report: called with what is being measured.

    Returns:
      The nearest built-in profile with everything replaced that its `measured` names.

    Raises:
      RuntimeError: a kernel read wrong data, a hand-off did not arrive, or the numbers make no sense together.
    """
    return build_profile(gpu, measure(gpu, report), name or gpu.slug())


def measure(gpu: Gpu, report: Report) -> Measured:
    """Runs all kernels; raises RuntimeError as `probe` does."""
    source = jax.jit(lambda: lax.broadcasted_iota(i32, (SOURCE // (UNIT_KIB * KIB), *BLOCK), 0))()
    report("device memory")
    stream = _stream(gpu.workers, source)
    report("hand-offs, relaxed")
    handoff = _handoff(gpu.workers, source, release=False)
    report("hand-offs, release and acquire")
    released = _handoff(gpu.workers, source, release=True)
    report("L2")
    return Measured(stream, handoff, released, _reads(gpu.workers, source))


def write_profile(profile: Profile, path: pathlib.Path | None = None) -> pathlib.Path:
    """Writes a profile as JSON, to $XDG_CACHE_HOME/mkdsl/profiles/NAME.json (by default under ~/.cache) unless told where; returns where."""
    path = path or directory("profiles") / f"{profile.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(profile.to_json(), indent=2) + "\n", encoding="utf-8")
    return path


def _stream(workers: int, source: jax.Array) -> Curve:
    units = STREAMED // (UNIT_KIB * KIB * workers)
    kernel = kernels.stream(workers, units)

    def once(in_flight: int) -> np.ndarray:
        results, landed = kernel(source, np.array([in_flight], np.int32))
        _check_landed(landed, in_flight, units, source.shape[0])
        return _rows(results, workers)

    streamed = units * workers * UNIT_KIB * KIB
    return tuple((w * UNIT_KIB, streamed / _median(lambda w=w: span_us(once(w))) * 1e6) for w in STREAM_WINDOWS)


def _handoff(workers: int, source: jax.Array, *, release: bool) -> Curve:
    kernel = kernels.handoff(workers, 8, release=release)
    return tuple((w * UNIT_KIB, _round_us(kernel, workers, source, w, release=release)) for w in HANDOFF_WINDOWS)


def _reads(workers: int, source: jax.Array) -> Curve:
    made = {kib: kernels.handoff(workers, kib, release=False) for kib in READ_KIB}
    return tuple((kib * KIB, _round_us(kernel, workers, source, READ_WINDOW, release=False)) for kib, kernel in made.items())


def _round_us(kernel: Callable[..., jax.Array], workers: int, source: jax.Array, in_flight: int, *, release: bool) -> float:
    def once() -> float:
        results = _rows(kernel(source, np.array([in_flight], np.int32)), workers)
        _check_arrived(results, release=release)
        return round_us(results)

    return _median(once)


def _rows(results: jax.Array, workers: int) -> np.ndarray:
    return np.asarray(results).reshape(workers, COLUMNS)


def _median(once: Callable[[], float]) -> float:
    once()  # the first launch compiles, and wakes the GPU
    return float(np.median([once() for _ in range(REPEATS)]))


def _check_landed(landed: jax.Array, in_flight: int, units: int, blocks: int) -> None:
    """The last units of every worker are in its stages: block b is filled with the number b."""
    workers, slots = landed.shape[0], np.arange(in_flight)
    last = units - 1 - (units - 1 - slots) % in_flight  # the last unit of each slot
    expected = (last * workers + np.arange(workers)[:, None]) % blocks
    if not (np.asarray(landed[:, :in_flight]) == expected[:, :, None, None]).all():
        raise RuntimeError(f"probe: the stream read wrong data, with {in_flight} units in flight")


def _check_arrived(results: np.ndarray, *, release: bool) -> None:
    absent = np.flatnonzero(results[:, ARRIVED] != 1)
    if absent.size:
        raise RuntimeError(f"probe: a hand-off never arrived at {absent.size} of {len(results)} workers; is another process using the GPU?")
    if release and results[:, AGAIN].any():
        raise RuntimeError(f"probe: data was missing behind a release/acquire counter, {results[:, AGAIN].sum()} times")
