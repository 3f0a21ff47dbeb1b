"""The shortest path through the DAG of (phase, candidate) states, for one ring.

A path's cost is the sum over segments of repeats x the time of one iteration. The ring couples neighbours: how far the loader is ahead when
a phase starts depends on all phases before it, so a state carries labels (time, ahead), and a label is dropped only if another one can do
whatever it can, by waiting if need be: it is no later, and no further behind than it is earlier. Since more ahead never makes a phase end
later (`advance` is monotone), no best path is lost, and the result equals trying every combination.

A loop runs in steady state: an iteration starts as far ahead as the one before ended. The start is tried at a few values, and an iteration
that ends less far ahead than it started is charged with waiting for the difference.
"""

import collections
import functools
from collections.abc import Callable, Container
from typing import Any, NamedTuple

from mkdsl.graph import AttentionPhase, OpGraph, Phase
from mkdsl.search._candidates import Candidate
from mkdsl.search._cost import Cost, advance, no_worse

STARTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the ring's capacity
Splits = tuple[tuple[str, int], ...]  # attention tensors that later phases read, and their splits
Chain = tuple[Any, Candidate]  # (the chain before or None, candidate)
Price = Callable[[Phase, int, Candidate, Splits], Cost]


class Label(NamedTuple):
    time: float
    ahead: float
    chain: Chain | None


class Move(NamedTuple):
    """A candidate of the next phase. splits: as they are after it."""

    candidate: Candidate
    cost: Cost
    splits: Splits


class Found(NamedTuple):
    cost: float
    candidates: tuple[Candidate, ...]


def shortest_path(graph: OpGraph, choices: dict[str, list[tuple[int, Candidate]]], price: Price, capacity: float) -> Found | None:
    """The cheapest combination of one candidate per phase; None if there is none.

    Args:
      graph: what is scheduled.
      choices: per phase its candidates with a number that `price` knows them by.
      price: the cost of one execution of a phase as a candidate, given the splits of what it reads.
      capacity: microseconds of stream that a full ring holds.
    """
    states: dict[Splits, tuple[float, Chain | None]] = {(): (0.0, None)}
    moves = functools.cache(functools.partial(_moves, graph, choices, price, capacity))
    for segment in graph.segments:
        after: dict[Splits, tuple[float, Chain | None]] = {}
        for splits, (base, chain) in states.items():
            for start in STARTS if segment.repeats > 1 else STARTS[:1]:
                labels = {splits: [Label(0.0, start * capacity, chain)]}
                for name in segment.phases:
                    labels = _extend(functools.partial(moves, name), capacity, labels)
                for end, label in ((end, label) for end, found in labels.items() for label in found):
                    total = base + segment.repeats * (label.time + max(0.0, start * capacity - label.ahead))
                    if end not in after or total < after[end][0]:
                        after[end] = (total, label.chain)
        states = after
    if not states:
        return None
    cost, chain = min(states.values(), key=lambda state: state[0])
    return Found(cost, _unchain(chain))


def _moves(
    graph: OpGraph, choices: dict[str, list[tuple[int, Candidate]]], price: Price, capacity: float, name: str, splits: Splits
) -> list[Move]:
    """A phase's candidates with what they cost and the splits after them, but for those than which another one is no worse in anything."""
    phase, out = graph.phase(name), collections.defaultdict(list)
    later = {t for p in graph.phases[graph.order[name] + 1 :] for t in p.reads}
    for number, candidate in choices[name]:
        move = Move(candidate, price(phase, number, candidate, splits), _splits_after(phase, candidate, splits, later))
        kept = out[move.splits]
        if not any(no_worse(old.cost, move.cost, capacity) for old in kept):
            kept.append(move)
    return [move for kept in out.values() for move in kept]


def _extend(moves: Callable[[Splits], list[Move]], capacity: float, labels: dict[Splits, list[Label]]) -> dict[Splits, list[Label]]:
    out: dict[Splits, list[Label]] = collections.defaultdict(list)
    for splits, before in labels.items():
        for candidate, cost, after in moves(splits):
            for label in before:
                took, ahead = advance(cost, label.ahead, capacity)
                _insert(out[after], Label(label.time + took, ahead, (label.chain, candidate)))
    return out


def _insert(labels: list[Label], new: Label) -> None:
    if any(_serves(old, new) for old in labels):
        return
    labels[:] = [old for old in labels if not _serves(new, old)]
    labels.append(new)


def _serves(a: Label, b: Label) -> bool:
    """Whether a can wait to become at least as good as b."""
    return a.time <= b.time and b.ahead - a.ahead <= b.time - a.time


def _splits_after(phase: Phase, candidate: Candidate, splits: Splits, later: Container[str]) -> Splits:
    """With this phase's own, and without those that nobody reads from here on."""
    if isinstance(phase, AttentionPhase):
        splits = (*splits, (phase.writes[0], candidate.plan.splits))
    return tuple(s for s in splits if s[0] in later)


def _unchain(chain: Chain | None) -> tuple[Candidate, ...]:
    out = []
    while chain is not None:
        chain, candidate = chain
        out.append(candidate)
    return tuple(reversed(out))
