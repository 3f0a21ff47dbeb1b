"""`Schedule`: every decision of one megakernel, as plain frozen data that prints and round-trips through JSON."""

import dataclasses
import functools
from typing import Any

from mkdsl.graph import ITEMSIZE, FoldPhase, Phase, Tensor
from mkdsl.schedule._handoff import Handoff
from mkdsl.schedule._phase_plans import PhasePlan, plan_from_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """How a tensor crosses phases.

    incarnations: copies that successive instances (iterations) use in turn. With sentinels, whoever writes a row in one incarnation clears
      the same row in the next.
    splits: partial carries in slots of their own, which the readers merge in slot order (attention only).
    dtype: "bfloat16" only for what all readers round to that (`Tensor.rounds`), and not for partial carries, which are merged first.
    """

    name: str
    handoff: Handoff = Handoff.SENTINEL
    incarnations: int = 2
    splits: int = 1
    dtype: str = "float32"

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]


def narrowest(tensor: Tensor, splits: int) -> str:
    """The dtype of fewest bytes in which a tensor may cross without changing a bit of the result."""
    return "bfloat16" if tensor.rounds and splits == 1 else "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A plan for one (graph, batch, target).

    num_stages, stage_bytes: the ring. max_in_flight: units that the loader keeps in flight. smem_bytes: all shared memory of one worker.
    predicted_us: of one step, by the simulator. us: the same for one execution of each phase.
    """

    target: str
    batch: int
    padded_batch: int
    workers: int
    num_stages: int
    stage_bytes: int
    max_in_flight: int
    smem_bytes: int
    phases: tuple[PhasePlan, ...]
    tensors: tuple[TensorPlan, ...]
    predicted_us: float
    us: tuple[tuple[str, float], ...]

    def preloads(self, phase: Phase) -> bool:
        """Whether a fold asks for the older rows that its epilogue adds before it waits: only self-validating words allow that."""
        return isinstance(phase, FoldPhase) and all(self.tensor(t).handoff.self_validating for t in phase.row_reads)

    @property
    def cluster(self) -> int:
        """Workers of a thread-block cluster."""
        return max(p.cluster for p in self.phases)

    @property
    def order(self) -> tuple[str, ...]:
        """The phases in program order: one of the graph's orders."""
        return tuple(p.name for p in self.phases)

    def phased(self) -> "Schedule":
        """The same tiles for launches of one phase each: every tile is folded by its owner alone."""
        return dataclasses.replace(self, phases=tuple(p.alone() for p in self.phases))

    def plan(self, phase: str) -> PhasePlan:
        return self._plans[phase]

    def tensor(self, name: str) -> TensorPlan:
        return self._tensors[name]

    @functools.cached_property
    def _plans(self) -> dict[str, PhasePlan]:
        return {p.name: p for p in self.phases}

    @functools.cached_property
    def _tensors(self) -> dict[str, TensorPlan]:
        return {t.name: t for t in self.tensors}

    def __str__(self) -> str:
        us = dict(self.us)
        lines = [f"{self.target}, batch {self.batch}, {self.workers} workers: {self.predicted_us:.0f} us predicted"]
        ring = f"{self.num_stages} x {self.stage_bytes} bytes, {self.max_in_flight} in flight"
        lines += [f"  ring: {ring}; {self.smem_bytes} bytes of shared memory"]
        lines += [f"  {p.name}: {p.tiling}, {us[p.name]:.1f} us" for p in self.phases]
        return "\n".join(lines)

    def __repr__(self) -> str:
        """One line. All there is: `to_json`."""
        ring = f"{self.num_stages} stages of {self.stage_bytes} bytes"
        phases = f"{len(self.phases)} phases, batch {self.batch}, {self.workers} workers"
        return f"<Schedule for {self.target}: {phases}, {ring}, {self.predicted_us:.0f} us predicted>"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"phases": [p.to_json() for p in self.phases]}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Schedule":
        """What `to_json` returned, also after a way through JSON text."""
        tensors = tuple(TensorPlan(**t | {"handoff": Handoff(t["handoff"])}) for t in data["tensors"])
        phases = tuple(map(plan_from_json, data["phases"]))
        return Schedule(**data | {"phases": phases, "tensors": tensors, "us": tuple(map(tuple, data["us"]))})
