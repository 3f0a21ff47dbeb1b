"""What the plan of one phase may be: a rule a line, (holds, which rule, what is wrong), for each kind of phase."""

import functools
from collections.abc import Iterator

from mkdsl.graph import AttentionPhase, FoldPhase, MapPhase, OpGraph, Phase
from mkdsl.proof._errors import Rule, require
from mkdsl.schedule import AttentionPlan, FoldPlan, MapPlan, Profile, Schedule

MMA_K = 16  # elements of the streamed axis that one mma takes
SPLIT_K = (1, 2, 4, 8)  # the smallest right-hand side of an mma has 8 columns, and each piece of K needs one

Rules = Iterator[tuple[bool, Rule, str]]


def check_plan(graph: OpGraph, schedule: Schedule, phase: Phase, profile: Profile) -> None:
    """Raises ScheduleError for what no phase of its kind can be."""
    kind = schedule.plan(phase.name).kind
    require(kind == phase.kind, Rule.TILE, f"{phase.name}: has the plan of a {kind}, but is a {phase.kind}")
    for holds, rule, message in _rules(phase, graph, schedule, profile):
        require(holds, rule, f"{phase.name}: {message}")
    if not isinstance(phase, FoldPhase):
        check_unsplit(schedule, phase, phase.reads)


@functools.singledispatch
def _rules(phase: Phase, graph: OpGraph, schedule: Schedule, profile: Profile) -> Rules:
    raise NotImplementedError(phase.kind)


@_rules.register
def _(phase: FoldPhase, graph: OpGraph, schedule: Schedule, profile: Profile) -> Rules:
    p = schedule.plan(phase.name)
    assert isinstance(p, FoldPlan)
    least = min(p.split_k, p.k_stages, p.cluster, p.tile_k, p.epilogue_tiles)
    # Counts of something are at least one.
    yield (
        least >= 1,
        Rule.TILE,
        f"split_k={p.split_k} k_stages={p.k_stages} tile_k={p.tile_k} epilogue_tiles={p.epilogue_tiles}: each is at least 1",
    )
    # Each piece of a row meets its own piece of the resident in a column of its own.
    yield p.split_k in SPLIT_K, Rule.TILE, f"split_k={p.split_k}: a tile has {', '.join(map(str, SPLIT_K))}"
    # A carry that goes from a row's first to its last element cannot begin anew in the middle.
    whole = p.split_k == p.k_stages == p.cluster == 1
    yield (
        phase.parallel or whole,
        Rule.TILE,
        f"split_k={p.split_k} k_stages={p.k_stages} cluster={p.cluster} of a fold that takes whole rows",
    )
    # Units, K stages and pieces are all of the same size: the kernel has no code for a rest.
    divides = phase.k % (p.split_k * p.cluster * p.k_stages * p.tile_k) == 0
    yield (
        divides,
        Rule.TILE,
        f"split_k={p.split_k} x cluster={p.cluster} x k_stages={p.k_stages} x tile_k={p.tile_k} do not divide k={phase.k}",
    )
    # One unit is a whole number of mma steps.
    yield p.tile_k % MMA_K == 0, Rule.TILE, f"tile_k={p.tile_k} is no multiple of {MMA_K}"
    # Peers stage some columns each, so that no column may wait for a reduction over all of them.
    yield p.cluster == 1 or phase.separable, Rule.TILE, f"cluster={p.cluster} for a fold that needs its whole prologue at once"
    # The kernel sums over K stages in place, and over peers on arrival; it has no code for both.
    yield (
        p.cluster == 1 or p.k_stages == 1,
        Rule.TILE,
        f"k_stages={p.k_stages} and cluster={p.cluster}: K is split in time or over a cluster",
    )
    yield from _stage_rules(schedule, p.unit_bytes(phase), p.tile_k)
    known = profile.instructions if phase.parallel else ("mma",)
    yield p.instruction in known, Rule.INSTRUCTION, f"instruction {p.instruction!r}: {profile.name} has {', '.join(known)} for it"


@_rules.register
def _(phase: AttentionPhase, graph: OpGraph, schedule: Schedule, profile: Profile) -> Rules:
    p = schedule.plan(phase.name)
    assert isinstance(p, AttentionPlan)
    # Scores are masked and summed 64 positions at a time.
    yield p.block >= 1 and p.block % 64 == 0, Rule.TILE, f"block={p.block} is no multiple of 64"
    # Each of a unit's two copies reads one page, and none reads a page that the table does not have.
    yield p.meets_pages(phase), Rule.TILE, f"halves of block={p.block} do not lie in pages of {phase.page} of context={phase.context}"
    # Every share of an item has a block, or it would hand over nothing but its neutral carry.
    shares = p.splits * p.cluster
    blocks = phase.blocks(max(1, p.block))
    yield p.splits >= 1 and 1 <= shares <= blocks, Rule.TILE, f"splits={p.splits} x cluster={p.cluster} of {blocks} cache blocks"
    yield from _stage_rules(schedule, p.unit_bytes(phase), phase.head_dim)


@_rules.register
def _(phase: MapPhase, graph: OpGraph, schedule: Schedule, profile: Profile) -> Rules:
    p = schedule.plan(phase.name)
    assert isinstance(p, MapPlan)
    # An item is a whole number of the register layout's rows.
    whole = p.rows >= 1 and p.rows % 64 == 0 and all(part.rows % p.rows == 0 for part in phase.parts)
    yield whole, Rule.TILE, f"rows={p.rows}: no multiple of 64 that divides {[part.rows for part in phase.parts]}"
    # What the prologue reduces is laid over rows as a fold's resident is.
    widths = [*phase.reduced, *(graph.tensors[name].width for name in phase.reads)]
    even = p.split_k in SPLIT_K and all(width % (p.split_k * MMA_K) == 0 for width in widths)
    yield even, Rule.TILE, f"split_k={p.split_k} does not divide the {widths} that it reduces"


def _stage_rules(schedule: Schedule, unit: int, columns: int) -> Rules:
    # All views of the ring have stages equally far apart, so that a stage is whole blocks of 8 rows in each of them.
    row = 16 * columns
    s = schedule.stage_bytes
    yield s % row == 0, Rule.STAGE, f"a stage of {s} bytes is no multiple of 8 rows of {row // 8}"
    yield unit <= s, Rule.STAGE, f"a unit of {unit} bytes does not fit a stage of {s}"


def check_unsplit(schedule: Schedule, phase: Phase, tensors: tuple[str, ...]) -> None:
    """Raises ScheduleError if a phase that does not merge splits reads one of these tensors in splits."""
    for name in tensors:
        splits = schedule.tensor(name).splits
        require(splits == 1, Rule.SPLITS, f"{phase.name}: reads {name}, left in {splits} splits; only a fold's resident merges splits")
