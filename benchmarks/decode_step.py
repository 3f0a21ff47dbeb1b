"""One model's decode step on the GPU at hand: checked against float32, then timed beside plain `jax.jit` in the same run.

    python benchmarks/decode_step.py llama-3.2-1b --batch 1 --context 512 [--form phased] [--handoff release-acquire] [--launches 1000]
        [--target a100] [--copies cp.async] [--deadline 1.0]

Random weights and a random cache, positions near the end of the context. Kernel time is CUPTI's; a step is wall clock over 50 steps, the
token of one feeding the next, cache donated. --target schedules for another GPU, which must have no more SMs than the one at hand, and
--copies cp.async copies as GPUs without TMA do, so that their kernels can be checked on a newer one. --deadline has workers look at the clock while
they wait for each other.
"""

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from mkdsl.graph import build_graph
from mkdsl.lower import lower
from mkdsl.models import SHAPES, decode_step, init_cache, random_params
from mkdsl.schedule import PROFILES, Handoff
from mkdsl.search import search


def shapes(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def float32(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def kernel_us(f, *args, iterations=20) -> tuple[float, float]:
    """(longest kernel, all kernels) of a call, microseconds, median over iterations."""
    runs: Any = profiler.Cupti(finalize=False).measure(f, aggregate=False, iterations=iterations)(*args)[1]
    times = [[ms for _, ms in run] for run in runs]
    return 1e3 * float(np.median([max(t) for t in times])), 1e3 * float(np.median([sum(t) for t in times]))


def step_us(step, params, kv, token, pos, steps=50):
    """Wall clock of a step, microseconds; the last of three rounds, so that nothing compiles in it."""
    for _ in range(3):
        cache, t = jax.tree.map(lambda a: a + 0, kv), token
        start = time.perf_counter()
        for _ in range(steps):
            t, logits, cache = step(params, cache, t, pos)
        jax.block_until_ready(logits)
        took = 1e6 * (time.perf_counter() - start) / steps
    return took


def main():
    parser = argparse.ArgumentParser(description="Checks and times one model's decode step.")
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--form", default="mega", choices=("mega", "phased"))
    parser.add_argument("--handoff", type=Handoff, default=Handoff.SENTINEL, choices=[*Handoff])
    parser.add_argument("--launches", type=int, default=1000)
    parser.add_argument("--target", default="h200", choices=PROFILES)
    parser.add_argument("--copies", choices=("cp.async",), help="by default what the target has")
    parser.add_argument("--deadline", type=float, help="seconds; by default none")
    a = parser.parse_args()
    config, target = SHAPES[a.model], PROFILES[a.target]
    if a.copies:
        target = dataclasses.replace(target, capability=(8, 0))
    step = decode_step(config)
    params = jax.jit(lambda key: random_params(config, key, jnp.bfloat16))(jax.random.key(0))
    empty = init_cache(config, a.context, batch=a.batch)
    kv = jax.tree.map(lambda x: (jax.random.normal(jax.random.key(3), x.shape) * 0.5).astype(x.dtype), empty)
    token, pos = np.arange(a.batch, dtype=np.int32) + 5, np.asarray(a.context - 12 - 7 * np.arange(a.batch), np.int32)
    one = jax.ShapeDtypeStruct((), jnp.int32)
    graph, tree = build_graph(step, shapes(params), jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), kv), one, one)
    schedule = search(graph, batch=a.batch, target=target, handoff=a.handoff)
    program = lower(graph, schedule, target, tree, form=a.form, deadline=a.deadline)
    kernel, reference = jax.jit(program), jax.jit(jax.vmap(step, (None, 0, 0, 0)))
    out, want = kernel(params, kv, token, pos), reference(float32(params), float32(kv), token, pos)[1]

    def error(logits):
        return float((jnp.linalg.norm(logits - want, axis=1) / jnp.linalg.norm(want, axis=1)).max())

    same = sum(bool((kernel(params, kv, token, pos)[1] == out[1]).all()) for _ in range(a.launches))
    longest, all_kernels = kernel_us(kernel, params, kv, token, pos)
    whole = step_us(jax.jit(program, donate_argnums=1), params, kv, token, pos)
    plain = step_us(jax.jit(jax.vmap(step, (None, 0, 0, 0)), donate_argnums=1), params, kv, token, pos)
    copies = "TMA" if program.tma else "cp.async"
    print(f"{a.model} batch {a.batch} context {a.context} {a.form} {a.handoff} {copies} for {a.target} on {jax.devices()[0].device_kind}")
    print(f"  error against float32: {error(out[1]):.5f}; plain jax.jit in bf16: {error(reference(params, kv, token, pos)[1]):.5f}")
    print(f"  the same bits in {same} of {a.launches} launches")
    print(f"  kernel {longest:.1f} us, all kernels {all_kernels:.1f} us, step {whole:.1f} us; predicted {schedule.predicted_us:.0f} us")
    print(f"  plain jax.jit, step {plain:.1f} us: {plain / whole:.2f} x")


if __name__ == "__main__":
    main()
