"""What a benchmark of a server watches: that something comes, and that nothing grows."""

import faulthandler
import pathlib
import re
import statistics
import time
from typing import Self

import jax

from mkdsl.engine import Engine

MOST = 64  # MiB that may come to be: what allocators keep, and what is compiled late


class Watchdog:
    """Ends the process, with the stacks of all its threads, when it has not been called for some seconds."""

    def __init__(self, seconds: float = 60) -> None:
        self._seconds, self._last = seconds, 0.0

    def __call__(self) -> None:
        """Something has come."""
        if (now := time.monotonic()) - self._last > self._seconds / 60:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=2)
            self._last = now

    def __enter__(self) -> Self:
        self()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._last = 0.0


class Memory:
    """The host's, as it goes on, and the device's, where it says so, in the beginning and now. In MiB."""

    def __init__(self) -> None:
        self._host, self._device = [_resident()], _in_use()

    def look(self) -> None:
        """Notes how much there is now."""
        self._host.append(_resident())

    @property
    def growth(self) -> float:
        """The host's from its first third to its last, by their medians, since what is leaked is leaked all the time; or the device's, if that is more."""
        third = -(-len(self._host) // 3)
        host = statistics.median(self._host[-third:]) - statistics.median(self._host[:third])
        return max(host, 0.0 if self._device is None else (_in_use() or 0.0) - self._device)

    @property
    def said(self) -> tuple[str, str]:
        """The host's first, most and last; the device's before and now."""
        device = "-" if self._device is None else f"{self._device:.1f}, {_in_use():.1f}"
        return f"{self._host[0]}, {max(self._host)}, {self._host[-1]}", device


def idle(engine: Engine) -> None:
    """Waits until nobody has anything; a request that was cancelled is over after the step under way."""
    while (stats := engine.stats()).waiting or stats.running:
        time.sleep(0.01)


def given_back(engine: Engine, memory: Memory) -> dict[str, str]:
    """What an idle engine holds: cells of a table."""
    (host, device), stats = memory.said, engine.stats()
    return {
        "pages held": f"{stats.pages - stats.free} of {stats.pages}",
        "host MiB: first, most, last": host,
        "device MiB: first, last": device,
    }


def left(engine: Engine, memory: Memory) -> list[str]:
    """What an idle engine should not hold."""
    stats = engine.stats()
    pages = [] if stats.free == stats.pages else [f"{stats.pages - stats.free} of {stats.pages} pages are held, and nobody is there"]
    return pages + ([f"memory grew by {memory.growth:.0f} MiB"] if memory.growth > MOST else [])


def _resident() -> int:
    return int(re.findall(r"VmRSS:\s+(\d+)", pathlib.Path("/proc/self/status").read_text(encoding="utf-8"))[0]) >> 10


def _in_use() -> float | None:
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_in_use"] / (1 << 20) if stats else None
