"""Does the simulator rank schedules as the GPU does? Runs one candidate of a model's decode step, checked against float32, and times its kernel.

    python benchmarks/candidates.py llama-3.2-1b --batch 1 --context 512 --list
    for i in $(seq 0 11); do timeout 120 python benchmarks/candidates.py llama-3.2-1b --pick $i; done

Candidates are the cheapest of every ring, and the winner's ring with fewer stages and other numbers of units in flight. One process
each: a kernel that hung would take only its own with it. The last line of each run is `candidate,predicted_us,measured_us,error`.
"""

import argparse
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from decode_step import float32, kernel_us, shapes

from mkdsl.graph import OpGraph, build_graph
from mkdsl.lower import lower
from mkdsl.models import SHAPES, decode_step, init_cache, random_params
from mkdsl.schedule import KIB, Handoff, Profile, Schedule, profile, shared_memory
from mkdsl.search import RINGS, cheapest, draft, timed, with_handoffs

OTHERS = ((0, 1), (0, 3), (-1, 2), (-2, 2), (-3, 2), (-1, 3))  # stages more than the winner has, units in flight


def candidates(graph: OpGraph, batch: int, gpu: Profile) -> Iterator[Schedule]:
    rings = (cheapest(graph, batch, gpu, Handoff.SENTINEL, ring)[:1] for ring in RINGS)
    drafts = (draft(graph, batch, Handoff.SENTINEL, choice) for choices in rings for choice in choices)
    found = [timed(graph, with_handoffs(graph, s), gpu) for s in drafts]
    yield from found
    best = min(found, key=lambda s: s.predicted_us)
    for more, in_flight in OTHERS:
        n = best.num_stages + more
        if (more, in_flight) != (0, best.max_in_flight) and n >= max(2, in_flight):
            memory = shared_memory(graph, best.phases, padded_batch=best.padded_batch, num_stages=n, stage_bytes=best.stage_bytes)
            yield timed(graph, dataclasses.replace(best, num_stages=n, max_in_flight=in_flight, smem_bytes=memory.total), gpu)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times one candidate schedule of a model.")
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--pick", type=int, default=0)
    parser.add_argument("--list", action="store_true")
    a = parser.parse_args()
    config, target = SHAPES[a.model], profile("H200")
    step, one = decode_step(config), jax.ShapeDtypeStruct((), jnp.int32)
    abstract = jax.eval_shape(lambda: (random_params(config, jax.random.key(0), jnp.bfloat16), init_cache(config, a.context)))
    params, kv = shapes(abstract)
    graph, tree = build_graph(step, params, kv, one, one)
    for number, schedule in enumerate(candidates(graph, a.batch, target)):
        ring = f"{schedule.num_stages} x {schedule.stage_bytes // KIB} KiB, {schedule.max_in_flight} in flight"
        if a.list:
            print(f"{number}: {ring}: {schedule.predicted_us:.0f} us predicted")
        if number == a.pick and not a.list:
            error, us = measure(config, step, lower(graph, schedule, target, tree), a.batch, a.context)
            print(f"{ring.replace(',', '')},{schedule.predicted_us:.1f},{us:.1f},{error:.4f}", flush=True)


def measure(config, step, program, batch: int, context: int) -> tuple[float, float]:
    """(relative L2 error of the logits, microseconds of the kernel)."""
    params = jax.jit(lambda key: random_params(config, key, jnp.bfloat16))(jax.random.key(0))
    kv = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(3), x.shape).astype(x.dtype) * 0.5, init_cache(config, context, batch=batch)
    )
    token, pos = np.arange(batch, dtype=np.int32) + 5, np.asarray(context - 12 - 7 * np.arange(batch), np.int32)
    kernel = jax.jit(program)
    got = kernel(params, kv, token, pos)[1]
    want = jax.jit(jax.vmap(step, (None, 0, 0, 0)))(float32(params), float32(kv), token, pos)[1]
    error = float((jnp.linalg.norm(got - want, axis=1) / jnp.linalg.norm(want, axis=1)).max())
    return error, kernel_us(kernel, params, kv, token, pos)[0]


if __name__ == "__main__":
    main()
