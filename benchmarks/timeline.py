"""Where one decode step's time goes, measured in the kernel beside what the simulator predicts.

    python benchmarks/timeline.py llama-3.2-1b --batch 8 --context 512 [--target h200]

For each phase, the median over workers and over the iterations of its loop but the first two, in microseconds: waiting for the
input, reading it, folding, the epilogue; and `us`, from the last signal of the phase before to its own last signal. The stamps cost time
themselves: the line above says how much.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from decode_step import kernel_us, shapes

from mkdsl.graph import build_graph
from mkdsl.lower import lower
from mkdsl.models import SHAPES, decode_step, init_cache, random_params
from mkdsl.schedule import PROFILES
from mkdsl.search import search
from mkdsl.simulate import simulate

SKIPPED = 2  # iterations of a loop until it is in steady state


def measured(graph, stamps):
    """Per phase of each loop (wait, read, fold, epilogue, us)."""
    order = [(name, i) for s in graph.segments for i in range(s.repeats) for name in s.phases]
    stamps = stamps.astype(np.int64) - stamps[stamps != 0].astype(np.int64).min()
    ends = np.where(stamps[..., -1] < 0, -1, stamps[..., -1]).max(axis=0)
    out = {}
    for step, (name, i) in enumerate(order):
        repeats = graph.iterations(graph.phase(name))
        if i >= min(SKIPPED, repeats - 1):
            took = stamps[stamps[:, step, -1] >= 0, step]
            parts = np.median(np.diff(took, axis=1), axis=0)
            out.setdefault(name, []).append((*parts, ends[step] - max(ends[:step], default=0)))
    return {name: np.median(rows, axis=0) / 1e3 for name, rows in out.items()}


def predicted(graph, schedule, profile):
    timeline = simulate(graph, schedule, profile)
    us, out = dict(timeline.phase_us), {}
    for phase in graph.phases:
        spans = [s for s in timeline.spans if s.phase == phase.name]
        last = max(s.iteration for s in spans)
        parts = np.median([np.diff((s.arrived, s.known, s.read, s.folded, s.signalled)) for s in spans if s.iteration == last], axis=0)
        out[phase.name] = np.array((*parts, us[phase.name]))
    return out


def main():
    parser = argparse.ArgumentParser(description="Times the phases of one model's decode step inside the kernel.")
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--target", default="h200", choices=PROFILES)
    a = parser.parse_args()
    config, profile = SHAPES[a.model], PROFILES[a.target]
    params = jax.jit(lambda key: random_params(config, key, jnp.bfloat16))(jax.random.key(0))
    empty = init_cache(config, a.context, batch=a.batch)
    kv = jax.tree.map(lambda x: (jax.random.normal(jax.random.key(3), x.shape) * 0.5).astype(x.dtype), empty)
    token, pos = np.arange(a.batch, dtype=np.int32) + 5, np.asarray(a.context - 12 - 7 * np.arange(a.batch), np.int32)
    one = jax.ShapeDtypeStruct((), jnp.int32)
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), kv)
    graph, tree = build_graph(decode_step(config), shapes(params), cache, one, one)
    schedule = search(graph, batch=a.batch, target=profile)
    program = lower(graph, schedule, profile, tree)
    plain, timed = jax.jit(program), jax.jit(program.timed)
    args = params, kv, token, pos
    out, (again, _) = plain(*args), timed(*args)
    assert (out[1] == again[1]).all(), "the kernel with stamps computes something else"
    stamps = np.asarray(timed(*args)[1]).view(np.uint32)
    print(f"{a.model} batch {a.batch} context {a.context} for {a.target} on {jax.devices()[0].device_kind}")
    print(
        f"  kernel {kernel_us(plain, *args)[0]:.1f} us, with stamps {kernel_us(timed, *args)[0]:.1f} us; predicted {schedule.predicted_us:.0f} us"
    )
    columns = "".join(f"{name:>9}" for name in ("wait", "read", "fold", "epilogue", "us"))
    print(f"  {'phase':<14}{columns}   predicted:{columns}")
    expected = predicted(program.graph, schedule, profile)
    for name, row in measured(program.graph, stamps).items():
        print(f"  {name:<14}" + "".join(f"{x:9.1f}" for x in row) + " " * 13 + "".join(f"{x:9.1f}" for x in expected[name]))


if __name__ == "__main__":
    main()
