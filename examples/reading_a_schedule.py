"""Search a schedule of Llama-3.2-1B for an H200, from shapes alone, and read it. Needs neither a GPU nor weights."""

import jax
import jax.numpy as jnp

import mkdsl as mk
from mkdsl.models import SHAPES, abstract_params, decode_step, init_cache
from mkdsl.proof import verify_schedule
from mkdsl.schedule import Schedule, profile
from mkdsl.search import explain

CONTEXT = 4096


def trace(name, target):
    config = SHAPES[name]
    kv = jax.eval_shape(lambda: init_cache(config, CONTEXT))
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    return mk.jit(decode_step(config), target=target).trace(abstract_params(config), kv, scalar, scalar)


def walk_through(graph, schedule):
    """The phase that streams most, in sentences."""
    phase = max((p for p in graph.phases if graph.iterations(p) > 1), key=lambda p: p.streamed_bytes(1))
    plan, part = schedule.plan(phase.name), phase.parts[0]
    span = phase.k // plan.parts
    tiles = [n for _, n in plan.tasks[0]]
    busiest, idle = max(tiles), tiles.count(0)
    print(f"{phase.name} folds the rows of {' and '.join(part.weights)} [{part.rows}, {phase.k}] past an activation of {phase.k} features.")
    print(f"  A tile is {plan.rows} output rows x {plan.parts} parts = 64 mma rows; a part is {span} elements of a row.")
    unit = 64 * plan.chunk * 2 // 1024
    print(f"  It is streamed in units of 64 x {plan.chunk}, {unit} KiB each: {span // plan.chunk} to a tile and matrix.")
    print(f"  {sum(tiles)} tiles over {schedule.workers} workers: {min(n for n in tiles if n)} to {busiest} each, {idle} workers without.")
    print(f"  The resident is staged in {plan.pieces} piece(s); up to {plan.group} tiles finish together.")
    print(f"  It starts when {' and '.join(plan.waits)} has signalled." if plan.waits else "  It waits for nobody.")
    attention = next(p for p in graph.phases if p.kind == "attention")
    splits, blocks = schedule.plan(attention.name).splits, attention.k // schedule.plan(attention.name).chunk
    print(f"attention has {attention.kv_heads} kv heads x {splits} splits = {attention.kv_heads * splits} items;", end=" ")
    print(f"split s folds cache blocks s, s + {splits}, ... of {blocks}, and whoever reads the result merges the splits.")


def main():
    traced = trace("llama-3.2-1b", "h200")
    graph, schedule = traced.graph, traced.schedule()
    print("1. The decode step as phases. What stands after -> crosses from phase to phase; all else is fused into one of them.\n")
    print(graph)
    print("\n2. The schedule: a row for each phase, then the ring, shared memory, hand-offs, and the predicted time.\n")
    print(explain(graph, schedule, profile("h200")))
    print("\n3. One phase in words.\n")
    walk_through(graph, schedule)
    print("\n4. It is data: it goes through JSON, and is proven again before anything is made of it.\n")
    again = Schedule.from_json(schedule.to_json())
    verify_schedule(graph, again, profile("h200"))
    print(f"equal after the round trip: {again == schedule}; and verify_schedule has no objection")


if __name__ == "__main__":
    main()
