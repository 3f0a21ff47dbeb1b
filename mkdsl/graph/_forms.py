"""The forms of a decode step: its phases in other orders, and other values that cross between them.

Fused as it comes, a step has each value computed where nobody must wait for it (`_fuse`): a fold's finish computes all it can, and whoever
stages a resident computes it. Here are the alternatives. A fold phase may instead write what its folds give, for its readers to finish; and
a resident may cross, written once for all who stage it. Both are a choice of values that cross. Tensors of chosen values are named after
folds, so that names of phases and tensors tell a form from all others. Forms are built when they are asked for.
"""

import contextlib
from collections.abc import Collection, Iterator, Sequence

import networkx as nx

from mkdsl.graph._fuse import Fuser, free_name
from mkdsl.graph._types import AS_IT_COMES, Form, OpGraph, Segment, Step, UnsupportedError
from mkdsl.graph._verify import verify_graph

MOST_ORDERS = 8


def fused(step: Step, form: Form = AS_IT_COMES) -> OpGraph:
    """The step in a form, verified.

    Raises:
      UnsupportedError: something in it has no tile lowering.
    """
    return _fused(step, form)[0]


def orders(graph: OpGraph) -> list[OpGraph]:
    """The same values crossing, in all other orders of phases; if there are many, those that depart from the program's least and latest."""
    if graph.step is None:
        return []
    return [g for g in _orders(graph.step, graph.form.crossing) if g.form.order != graph.form.order]


def neighbours(graph: OpGraph) -> list[OpGraph]:
    """The forms in the same order in which one phase more, or one less, finishes at its readers or has its resident written once."""
    if graph.step is None:
        return []
    found = []
    for crossing in _crossings(graph, graph.step):
        with contextlib.suppress(UnsupportedError):  # what has no lowering is no alternative
            found.append(fused(graph.step, Form(graph.form.order, crossing)))
    return found


def form_of(graph: OpGraph, phases: Sequence[str], tensors: Collection[str]) -> OpGraph:
    """The form of a graph's step with these phases, in this order, and these tensors; the graph itself if there is none."""

    def same(g: OpGraph) -> bool:
        return tuple(g.order) == tuple(phases) and g.tensors.keys() == set(tensors)

    if graph.step is None or same(graph):
        return graph
    crossing = frozenset(id for id, name in crossing_names(graph.step).items() if name in tensors)
    return next((g for g in _orders(graph.step, crossing) if same(g)), graph)


def crossing_names(step: Step) -> dict[int, str]:
    """The values that may cross by choice, what folds give and what they stream past, and the names of their tensors."""
    labels: dict[int, str] = {}
    for id in nx.topological_sort(step.dag):
        node = step.node(id)
        weight = step.node(node.inputs[0]) if node.kind == "fold" else None
        if weight is not None and weight.kind == "param":
            labels[id] = free_name(weight.op.path.rsplit(".", 1)[-1], labels.values())
    residents: dict[int, list[str]] = {}
    for id, label in labels.items():
        residents.setdefault(step.node(id).inputs[1], []).append(label)
    names = {id: f"{'+'.join(past)}.in" for id, past in residents.items()}
    return names | {step.results.get(id, id): f"{label}.raw" for id, label in labels.items()}


def _orders(step: Step, crossing: frozenset[int]) -> Iterator[OpGraph]:
    scripts: list[tuple[int, ...]] = [()]
    for _ in range(MOST_ORDERS):
        if not scripts:
            return
        script = scripts.pop(0)
        try:
            graph, taken = _fused(step, Form(script, crossing))
        except UnsupportedError:
            return  # nor has it a lowering in another order
        yield graph
        for at in reversed(range(len(script), len(taken))):
            chosen = tuple(which for which, _ in taken[:at])
            scripts += [(*chosen, other) for other in range(1, taken[at][1])]


def _crossings(graph: OpGraph, step: Step) -> Iterator[frozenset[int]]:
    """This form's crossing values, with what one phase may add to them or take away."""
    crossing = graph.form.crossing
    for phase in (p for p in graph.phases if p.kind == "fold"):
        code = graph.code[phase.name]
        results = frozenset(step.results.get(fold, fold) for folds, _ in code.parts for fold in folds)
        inside = results - {id for _, written in code.parts for id in written}
        if inside or results & crossing:
            yield crossing | inside if inside else crossing - results
        resident = frozenset(id for id in (code.resident,) if id is not None and step.node(id).segment == phase.segment)
        if resident & crossing or not any(map(graph.stored, resident)):
            yield crossing ^ resident


def _fused(step: Step, form: Form) -> tuple[OpGraph, list[tuple[int, int]]]:
    """The step in a form; and, where several phases could have come next, (which did, of how many)."""
    names = crossing_names(step)
    fuser = Fuser(step, {id: names[id] for id in form.crossing}).run(form.order)
    segments = [
        Segment(phases=tuple(p.name for p in fuser.phases if p.segment == s), repeats=repeats) for s, repeats in enumerate(step.repeats)
    ]
    graph = OpGraph(
        step.dag, tuple(fuser.phases), tuple(segments), fuser.tensors, fuser.code, fuser.tensor_of, fuser.output_of, step.outputs,
        step.context, form, step,
    )  # fmt: skip
    verify_graph(graph)
    return graph, fuser.taken
