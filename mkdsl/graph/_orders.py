"""The orders of a decode step's phases. Where phases do not depend on each other, any of them may come first. The fold that comes last absorbs
what joins them, so each order is a graph of its own."""

import itertools

from mkdsl.graph._fuse import Fuser
from mkdsl.graph._phases import Segment
from mkdsl.graph._types import DecodeStep, OpGraph

MOST_ORDERS = 8


def orders(step: DecodeStep) -> list[OpGraph]:
    """The step with its phases in each order, the program's first; if there are many, those that depart from it least and latest.

    Phases of two orders may have the same names in the same sequence (weights of one name are numbered as they come). Only the first such
    order is returned, because a schedule says by the names of its phases which order it is for.
    """
    found: dict[tuple[str, ...], OpGraph] = {}
    scripts: list[tuple[int, ...]] = [()]
    for script in itertools.islice(scripts, MOST_ORDERS):  # a list that grows while it is walked
        fuser = Fuser(step).run(script)
        graph = _graph(step, fuser)
        found.setdefault(tuple(graph.order), graph)
        for at in reversed(range(len(script), len(fuser.taken))):
            chosen = tuple(which for which, _ in fuser.taken[:at])
            scripts += [(*chosen, other) for other in range(1, fuser.taken[at][1])]
    return list(found.values())


def _graph(step: DecodeStep, fuser: Fuser) -> OpGraph:
    segments = [
        Segment(phases=tuple(p.name for p in fuser.phases if p.segment == s), repeats=repeats) for s, repeats in enumerate(step.repeats)
    ]
    return OpGraph(
        step.dag, tuple(fuser.phases), tuple(segments), fuser.tensors, fuser.code, fuser.tensor_of, fuser.output_of,
        step.outputs, step.context, step.constants, step.where,
    )  # fmt: skip
