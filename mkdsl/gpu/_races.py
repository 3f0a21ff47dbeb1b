"""Races of interpreted kernels, raised.

Pallas's interpreter runs a launch's workers one after the other, prints of each race that it sees, and forgets it at the next launch. It compares
accesses by clocks that it starts anew with each worker, so it can miss what two workers do to one place. In a launch of one phase nothing is
ordered between workers: whatever one of them writes, no other may touch.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import source_info_util
from jax._src.pallas.mosaic.interpret.race_detection_state import _ranges_overlap  # JAX has no public word for its interpreter's state
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.race_detection_state import GPURaceDetectionState

from mkdsl.lower import Program

FIRST_BUFFER = 100  # the interpreter's number of a launch's first argument


class RaceError(RuntimeError):
    """Two workers of an interpreted kernel use one place, at least one of them writes, and nothing orders them: a bug of mkdsl."""


@dataclasses.dataclass(frozen=True)
class Access:
    """What a worker did to part of a tensor, and in which line of mkdsl."""

    worker: int
    writes: bool
    range: Any
    line: str

    def races(self, other: "Access") -> bool:
        return self.worker != other.worker and (self.writes or other.writes) and _ranges_overlap(self.range, other.range)

    def __str__(self) -> str:
        return f"worker {self.worker} {'writes' if self.writes else 'reads'} {self.range} ({self.line})"


class Launch(GPURaceDetectionState):
    """What one launch's workers do to the tensors it may write. A worker is known by the row of the task table that its threads read first."""

    def __init__(self, phase: str, operands: dict[int, str], **options: Any) -> None:
        super().__init__(**options)
        self.phase, self.operands = phase, operands
        self.worker: dict[Any, int] = {}
        self.accesses: dict[str, list[Access]] = collections.defaultdict(list)
        self.found: list[str] = []

    def check_read(self, thread: Any, clock: Any, buffer_key: Any, rnge: Any, source_info: Any = None) -> None:
        self._note(thread, buffer_key, rnge.range, source_info, writes=False)
        super().check_read(thread, clock, buffer_key, rnge, source_info)

    def check_write(self, thread: Any, clock: Any, buffer_key: Any, rnge: Any, source_info: Any = None) -> None:
        self._note(thread, buffer_key, rnge.range, source_info, writes=True)
        super().check_write(thread, clock, buffer_key, rnge, source_info)

    def _note(self, thread: Any, key: Any, place: Any, source_info: Any, *, writes: bool) -> None:
        tensor = self.operands.get(key.buffer_id - FIRST_BUFFER)
        if tensor == "table":
            self.worker[thread] = place[0]
        if tensor is None or thread not in self.worker:
            return
        line = source_info_util.summarize(source_info) if source_info is not None else "in JAX"
        access = Access(self.worker[thread], writes, place, line)
        with self.lock:
            before = self.accesses[tensor]
            other = next(filter(access.races, before), None)
            before.append(access)
            if other is not None:
                self.found.append(f"{self.phase}, {tensor}: {access}, {other}")


@contextlib.contextmanager
def races_raised(program: Program) -> Iterator[None]:
    """While an interpreted program runs to its end. Raises RaceError after it if there was a race."""
    operands = dict(enumerate(program.operand_names))
    phases = (name for s in program.graph.segments for _ in range(s.repeats) for name in s.phases)
    launches: list[Launch] = []

    def launch(**options: Any) -> Launch:
        launches.append(Launch(next(phases, "the kernel"), operands, **options))
        return launches[-1]

    before, gpu_callbacks.GPURaceDetectionState = gpu_callbacks.GPURaceDetectionState, launch  # type: ignore[misc]
    try:
        yield
    finally:
        gpu_callbacks.GPURaceDetectionState = before  # type: ignore[misc]
    found = [race for launch in launches for race in launch.found]
    found += [f"{launch.phase}, shared memory: as printed above" for launch in launches if launch.races_found and not launch.found]
    if found:
        raise RaceError(f"mk.jit: {len(found)} races in an interpreted kernel; this is a bug of mkdsl. The first: {found[0]}")


def run_watched(executable: Any, program: Program, *args: Any) -> Any:
    """An interpreted program's results. Raises RaceError where its workers race."""
    with races_raised(program):
        return jax.block_until_ready(executable(*args))
