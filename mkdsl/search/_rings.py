"""Under one ring: for each depth worth a search, the shortest path through all phases' candidates."""

import dataclasses
import math
from collections.abc import Iterator

from mkdsl.graph import AttentionPhase, OpGraph, Phase
from mkdsl.schedule import KIB, FoldPlan, Handoff, PhasePlan, Profile, fixed_bytes
from mkdsl.search._candidates import Candidate, candidates, padded
from mkdsl.search._cost import Cost, Model, Ring
from mkdsl.search._path import Found, Splits, shortest_path

# 32 to 72 KiB in flight: enough for full bandwidth, no more. Sizes that are no power of two suit widths like 576 or 3584.
RINGS = (
    Ring(32 * KIB, 2),
    Ring(16 * KIB, 2),
    Ring(16 * KIB, 3),
    Ring(16 * KIB, 4),
    Ring(24 * KIB, 2),
    Ring(28 * KIB, 2),
    Ring(36 * KIB, 2),
)


def rings(graph: OpGraph) -> tuple[Ring, ...]:
    """The rings whose stages are whole swizzled blocks as every attention's caches have them."""
    whole = math.lcm(KIB, *(16 * p.head_dim for p in graph.phases if isinstance(p, AttentionPhase)))  # bytes of 8 positions of bfloat16
    return tuple(dict.fromkeys(Ring(ring.stage_bytes // whole * whole, ring.max_in_flight) for ring in RINGS))


Choices = dict[str, list[tuple[int, Candidate]]]  # per phase, its candidates with their numbers


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the search decided: how the GPU is launched, the ring, its depth, and a candidate per phase."""

    gpu: Profile
    ring: Ring
    num_stages: int
    found: Found


def numbered(graph: OpGraph, batch: int, gpu: Profile, ring: Ring) -> Choices:
    """All candidates of all phases under a ring."""

    def of(phase: Phase) -> list[Candidate]:
        return candidates(
            graph,
            phase,
            batch=batch,
            stage_bytes=ring.stage_bytes,
            workers=gpu.workers,
            smem_bytes=gpu.smem_bytes,
            clusters=gpu.sizes,
            instructions=gpu.instructions,
        )

    return {p.name: list(enumerate(of(p))) for p in graph.phases}


def cheapest(graph: OpGraph, batch: int, gpu: Profile, handoff: Handoff, ring: Ring) -> list[Choice]:
    """The best candidates for each depth of a ring that is worth a search, the cheapest depth first; of equally cheap ones the deepest.
    Where the best splits an attention over workers, also the best that splits none: its hand-off has fewer bytes, and only the simulator
    sees how unevenly workers are loaded."""
    every = numbered(graph, batch, gpu, ring)
    price = Prices(graph, Model(graph, batch, gpu, ring, released=handoff.releases, padded_batch=padded(batch)))
    all_of = {p.name: best_instruction(p, every[p.name], price) for p in graph.phases}
    out = []
    for num_stages, choices in _depths(graph, batch, gpu, ring, all_of):
        for some in (choices, {name: [(i, c) for i, c in found if c.plan.splits == 1] for name, found in choices.items()}):
            found = shortest_path(graph, some, price, ring.capacity(gpu, num_stages)) if all(some.values()) else None
            out += [Choice(gpu, ring, num_stages, found)] if found is not None else []
            if found is None or all(c.plan.splits == 1 for c in found.candidates):
                break
    return sorted(out, key=lambda choice: choice.found.cost)


def best_instruction(phase: Phase, found: list[tuple[int, Candidate]], price: "Prices") -> list[tuple[int, Candidate]]:
    """Of candidates that are alike but for the instruction, the one that computes faster: nothing else depends on it."""
    best: dict[PhasePlan, tuple[int, Candidate]] = {}
    for number, candidate in sorted(found, key=lambda each: price(phase, *each, ()).compute):
        best.setdefault(_but_for_instruction(candidate.plan), (number, candidate))
    return sorted(best.values(), key=lambda each: each[0])


def _but_for_instruction(plan: PhasePlan) -> PhasePlan:
    return dataclasses.replace(plan, instruction="") if isinstance(plan, FoldPlan) else plan


class Prices:
    """Costs of (phase, candidate number, splits of what it reads), each computed once."""

    def __init__(self, graph: OpGraph, model: Model) -> None:
        self.graph, self.model = graph, model
        self.known: dict[tuple[str, int, Splits], Cost] = {}

    def __call__(self, phase: Phase, number: int, candidate: Candidate, splits: Splits) -> Cost:
        key = phase.name, number, splits
        if key not in self.known:
            self.known[key] = self.model.cost(phase, candidate, dict(splits))
        return self.known[key]


def _depths(graph: OpGraph, batch: int, gpu: Profile, ring: Ring, all_of: Choices) -> Iterator[tuple[int, Choices]]:
    """(num_stages, candidates for which that leaves room) worth a search: a shallower ring only if it admits more candidates."""
    room = gpu.smem_bytes - fixed_bytes(graph, padded(batch), max(gpu.sizes))
    before = 0
    for num_stages in range(room // ring.stage_bytes, max(2, ring.max_in_flight) - 1, -1):
        left = room - num_stages * ring.stage_bytes
        choices = {name: [(i, c) for i, c in found if c.bytes <= left] for name, found in all_of.items()}
        admitted = sum(map(len, choices.values()))
        if all(choices.values()) and admitted > before:
            before = admitted
            yield num_stages, choices
