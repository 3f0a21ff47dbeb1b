"""The GPUs that are known from the start, and how a profile is found.

Sources, named at each profile: *measured* is on one H200 (docs/mosaic_gpu_notes.md); *public* are the vendor's data sheets; *assumed* is taken
over from the H200 where nothing better is known, bandwidths as the same fraction of the data sheet's, latencies and compute by the clock.
"""

import dataclasses
import json
import pathlib

from mkdsl.schedule._profile import KIB, Curve, Profile

_H200 = Profile(
    name="h200",
    capability=(9, 0),
    workers=132,
    clusters=((2, 0, 1.0),),
    smem_bytes=227 * KIB,
    bandwidth=4.61e12,
    stream=((8, 0.408), (16, 0.689), (24, 0.845), (32, 0.927), (40, 0.957), (48, 0.973), (64, 0.983), (160, 1.0)),
    l2_rate=25e9,
    load_us=0.016,
    clock_hz=1.98e9,
    handoff=((0, 1.0), (16, 1.2), (24, 1.4), (32, 1.6), (40, 1.9), (48, 2.2), (64, 2.9), (96, 4.6), (160, 4.9)),
    released=((0, 1.4), (32, 2.9), (64, 4.6), (160, 4.2)),
    issue_us=0.05,
    unit_us=0.03,
    mma_us=0.215,
    column_us=0.022,
    wgmma_us=0.24,
    wgmma_column_us=0.011,
    wgmma_wait_us=0.1,
    store_us=0.002,
    row_bytes=180,
    prologue_us=0.2,
    epilogue_us=0.3,
    next_epilogue_us=0.1,
    value_us=0.0085,
    exchange_us=0.2,
    exchange_rate=55e9,
    k_stage_us=1.2,
    attention_us=1.3,
    block_us=0.7,
    map_us=0.7,
    drift=0.15,
    drift_us=1.5,
)


def _assumed(name: str, *, capability: tuple[int, int], workers: int, smem_kib: int, sheet: float, clock_hz: float) -> Profile:
    """A GPU known from its data sheet: bandwidth `sheet` (bytes/s) reached as far as the H200 reaches its 4.8 TB/s."""
    slower = _H200.clock_hz / clock_hz
    bandwidth = sheet * _H200.bandwidth / 4.8e12
    needed = (bandwidth / workers) / (_H200.bandwidth / _H200.workers)  # bytes in flight for full bandwidth, relative (Little's law)
    return dataclasses.replace(
        _H200,
        name=name,
        capability=capability,
        workers=workers,
        clusters=_H200.clusters if capability >= (9, 0) else (),
        smem_bytes=smem_kib * KIB,
        bandwidth=bandwidth,
        stream=tuple((x * needed, y) for x, y in _H200.stream),
        l2_rate=_H200.l2_rate / slower,
        exchange_rate=_H200.exchange_rate / slower,
        clock_hz=clock_hz,
        handoff=_queued(_H200.handoff, slower, needed),
        released=_queued(_H200.released, slower, needed),
        **{field: getattr(_H200, field) * slower for field in _BY_CLOCK},
    )


_BY_CLOCK = (
    "load_us",
    "issue_us",
    "unit_us",
    "mma_us",
    "column_us",
    "wgmma_us",
    "wgmma_column_us",
    "wgmma_wait_us",
    "store_us",
    "prologue_us",
    "epilogue_us",
    "next_epilogue_us",
    "value_us",
    "exchange_us",
    "k_stage_us",
    "attention_us",
    "block_us",
    "map_us",
)


def _queued(curve: Curve, slower: float, needed: float) -> Curve:
    """Idle latency by the clock; what is queued in front of a hand-off takes longer where device memory is slower for each worker."""
    idle = curve[0][1]
    return tuple((x, idle * slower + (y - idle) / needed) for x, y in curve)


PROFILES: dict[str, Profile] = {
    p.name: p
    for p in (
        _H200,
        _assumed("h100", capability=(9, 0), workers=132, smem_kib=227, sheet=3.35e12, clock_hz=1.98e9),  # SXM5, 80 GB HBM3 (public)
        _assumed("a100", capability=(8, 0), workers=108, smem_kib=163, sheet=2.039e12, clock_hz=1.41e9),  # SXM4, 80 GB (public)
        _assumed("l20", capability=(8, 9), workers=92, smem_kib=99, sheet=864e9, clock_hz=2.52e9),  # public
        _assumed("l40s", capability=(8, 9), workers=142, smem_kib=99, sheet=864e9, clock_hz=2.52e9),  # public
        _assumed("b200", capability=(10, 0), workers=148, smem_kib=227, sheet=8.0e12, clock_hz=1.965e9),  # public
    )
}


def profile(name: str) -> Profile:
    """The GPU of this name, in any case, or what `mkdsl probe` wrote to a file whose name ends in .json.

    Raises:
      ValueError: there is none; the message lists those there are. Or the file cannot be read, or holds no profile.
    """
    if name.endswith(".json"):
        return _read(pathlib.Path(name))
    found = PROFILES.get(name.lower())
    if found is None:
        raise ValueError(f"no GPU profile {name!r}; there are {', '.join(sorted(PROFILES))}, and files of `mkdsl probe` by their path")
    return found


def _read(path: pathlib.Path) -> Profile:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"no GPU profile {str(path)!r}: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is no JSON") from None
    return Profile.from_json(data, str(path))
