"""How each kind of phase is lowered: a record a kind."""

import dataclasses
from collections.abc import Callable

from mkdsl.graph import AttentionPhase, FoldPhase, MapPhase, Phase
from mkdsl.lower._types import Buffer, Index
from mkdsl.lower.phases import _attention, _fold, _map
from mkdsl.lower.phases._accumulate import accumulate, accumulate_async, store_sums


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a kernel asks of a kind of phase.

    ring_views: (phase, plan, schedule) -> the ring as the phase sees it, by name. buffers: (phase, plan, batch) -> groups of shared memory that the
    phase needs for itself, by name; the groups lie in the same place. load, compute: (machine, phase, iteration, i) -> i, one execution by the
    loader and by compute, where i counts units of the ring.
    """

    ring_views: Callable[..., dict[str, Buffer]]
    buffers: Callable[..., list[dict[str, Buffer]]]
    load: Callable[..., Index]
    compute: Callable[..., Index]


KINDS: dict[type[Phase], Kind] = {
    FoldPhase: Kind(_fold.ring_views, _fold.buffers, _fold.load, _fold.compute),
    AttentionPhase: Kind(_attention.ring_views, _attention.buffers, _attention.load, _attention.compute),
    MapPhase: Kind(lambda *_: {}, lambda *_: [], lambda m, phase, iteration, i: i, _map.compute),  # streams nothing
}

__all__ = ["KINDS", "Kind", "accumulate", "accumulate_async", "store_sums"]
