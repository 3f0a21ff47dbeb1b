"""Search a schedule of Llama-3.2-1B for an H200, from shapes alone, and read it. Needs neither a GPU nor weights."""

import jax
import jax.numpy as jnp

import mkdsl as mk
from mkdsl.graph import AttentionPhase, FoldPhase, OpGraph
from mkdsl.models import SHAPES, abstract_params, decode_step, init_cache
from mkdsl.proof import verify_schedule
from mkdsl.schedule import KIB, AttentionPlan, FoldPlan, Schedule, profile
from mkdsl.search import explain

CONTEXT = 4096


def trace(name, target):
    config = SHAPES[name]
    kv = jax.eval_shape(lambda: init_cache(config, CONTEXT))
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    return mk.jit(decode_step(config), target=target).trace(abstract_params(config), kv, scalar, scalar)


def walk_through(graph: OpGraph, schedule: Schedule):
    """The fold that streams most, in sentences, and attention."""
    looped = [p for p in graph.phases if graph.iterations(p) > 1]
    phase = max((p for p in looped if isinstance(p, FoldPhase)), key=lambda p: p.streamed_bytes(1))
    plan, part = schedule.plan(phase.name), phase.parts[0]
    assert isinstance(plan, FoldPlan)
    tiles = [n for _, n in plan.tasks[0]]
    busy = [n for n in tiles if n]
    print(f"{phase.name} folds the rows of {' and '.join(part.weights)} [{part.rows}, {phase.k}] past an activation of {phase.k} features.")
    print(
        f"  A tile is {plan.rows} output rows, each cut into {plan.split_k} pieces of {phase.k // plan.split_k}: 64 rows for the tensor cores."
    )
    print(f"  K stages, one after the other: {plan.k_stages}. Workers of a cluster, each with a piece of K of its own: {plan.cluster}.")
    units = plan.stage_k(phase) // plan.tile_k
    print(
        f"  It is streamed in units of 64 x {plan.tile_k}, {plan.unit_bytes(phase) // KIB} KiB: {units} to a tile and matrix in each K stage."
    )
    print(f"  {sum(tiles)} tiles over {schedule.workers} workers: {min(busy)} to {max(busy)} each, {len(tiles) - len(busy)} without.")
    print(f"  One epilogue finishes up to {plan.epilogue_tiles} tiles.")
    print(f"  It starts when {' and '.join(plan.waits)} has signalled." if plan.waits else "  It waits for nobody.")
    attention = next(p for p in looped if isinstance(p, AttentionPhase))
    plan = schedule.plan(attention.name)
    assert isinstance(plan, AttentionPlan)
    print(
        f"attention has {attention.kv_heads} kv heads x {plan.splits} splits = {attention.kv_heads * plan.splits} items; split s folds",
        end=" ",
    )
    print(
        f"blocks s, s + {plan.splits}, ... of the cache's {attention.context // plan.block}, and whoever reads the result merges the splits."
    )


def main():
    traced = trace("llama-3.2-1b", "h200")
    graph, schedule = traced.graph, traced.schedule()
    print("1. The decode step as phases. What stands after -> crosses from phase to phase; all else is fused into one of them.\n")
    print(graph)
    print("\n2. The schedule: the prediction, words, a row for each phase, hand-offs, where time goes, what came second, shared memory.\n")
    print(explain(graph, schedule, profile("h200")))
    print("\n3. One phase in words.\n")
    walk_through(graph, schedule)
    print("\n4. It is data: it goes through JSON, and is proven again before anything is made of it.\n")
    again = Schedule.from_json(schedule.to_json())
    verify_schedule(graph, again, profile("h200"))
    print(f"equal after the round trip: {again == schedule}; and verify_schedule has no objection")


if __name__ == "__main__":
    main()
