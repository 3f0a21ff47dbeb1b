"""A phase without a stream: values computed row block by row block, such as the embedding that starts the residual stream."""

from typing import Any

from jax import lax

from mkdsl.graph import Phase
from mkdsl.lower._finish import row_leaves, store
from mkdsl.lower._frames import Rows, fetch
from mkdsl.lower._machine import Machine, i32
from mkdsl.lower._resident import Prologue
from mkdsl.lower._signals import wait
from mkdsl.lower._tiles import Tile


def map_phase(m: Machine, phase: Phase, l: Any, i: Any) -> Any:
    """One execution of a map; an item is `plan.rows` features of one sequence. It takes no units from the ring."""
    plan, code = m.schedule.plan(phase.name), m.graph.code[phase.name]
    wait(m, phase, l)
    m.stamp(phase, l, "known")
    if code.stats:
        width = m.graph.node(m.graph.node(code.stats[0]).inputs[0]).width
        Prologue(m, phase, code, Tile(8, plan.parts, width // plan.parts, 1, width, m.batch), l).run()
    m.stamp(phase, l, "read")
    m.stamp(phase, l, "folded")
    for part, (_, written) in enumerate(code.parts):
        first, n = m.tasks(phase, part)
        blocks = phase.parts[part].rows // plan.rows

        def item(t: Any, carry: Any, first: Any = first, blocks: int = blocks, part: int = part, written: Any = written) -> Any:
            at = first + t
            frame = Rows(m, phase, l, sequence=lax.div(at, blocks), sequences=1, first=lax.rem(at, blocks) * plan.rows, count=plan.rows)
            fetch([(frame, row_leaves(m, frame, written))])
            store(m, frame, part, written)
            return carry

        lax.fori_loop(0, n, item, i32(0))
    return i
