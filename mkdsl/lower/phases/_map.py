"""A phase without a stream: values computed row block by row block, such as the embedding that starts the residual stream."""

from jax import lax

from mkdsl.graph import MapPhase
from mkdsl.lower._events import wait
from mkdsl.lower._machine import Machine, i32
from mkdsl.lower._tile import Tile
from mkdsl.lower._types import Carry, Index
from mkdsl.lower.evaluate._evaluator import fetch
from mkdsl.lower.evaluate._frames import Rows
from mkdsl.lower.phases._epilogue import row_leaves, store
from mkdsl.lower.phases._prologue import Prologue
from mkdsl.schedule import MapPlan


def compute(m: Machine, phase: MapPhase, iteration: Index, i: Index) -> Index:
    """One execution of a map; an item is `plan.rows` features of one sequence. It takes no units from the ring."""
    plan, code = m.schedule.plan(phase.name), m.graph.code[phase.name]
    assert isinstance(plan, MapPlan)
    wait(m, phase, iteration)
    m.stamp(phase, iteration, "known")
    if code.stats:
        width = phase.reduced[0]
        Prologue(m, phase, code, Tile(8, plan.split_k, width // plan.split_k, 1, width, m.batch), iteration).run()
    m.stamp(phase, iteration, "read")
    m.stamp(phase, iteration, "folded")
    for part, (_, written) in enumerate(code.parts):
        first, n = m.tasks(phase, part)
        blocks = phase.parts[part].rows // plan.rows

        def item(
            t: Index, carry: Carry, first: Index = first, blocks: int = blocks, part: int = part, written: tuple[int, ...] = written
        ) -> Carry:
            at = first + t
            frame = Rows(
                m, phase, iteration, sequence=lax.div(at, blocks), sequences=1, first=lax.rem(at, blocks) * plan.rows, count=plan.rows
            )
            fetch([(frame, row_leaves(m, frame, written))])
            store(m, frame, part, written)
            return carry

        lax.fori_loop(0, n, item, i32(0))
    return i
