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

from mkdsl.gpu import measured_timeline
from mkdsl.graph import build_graph
from mkdsl.lower import lower
from mkdsl.models import SHAPES, decode_step, init_cache, random_params
from mkdsl.schedule import PROFILES
from mkdsl.search import search
from mkdsl.simulate import simulate


def rows(timeline):
    """Per phase (wait, read, fold, epilogue, us)."""
    return {name: (*timeline.parts_us(name).values(), us) for name, us in timeline.phase_us}


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
    stamps = np.asarray(timed(*args)[1])
    print(f"{a.model} batch {a.batch} context {a.context} for {a.target} on {jax.devices()[0].device_kind}")
    print(
        f"  kernel {kernel_us(plain, *args)[0]:.1f} us, with stamps {kernel_us(timed, *args)[0]:.1f} us; predicted {schedule.predicted_us:.0f} us"
    )
    columns = "".join(f"{name:>9}" for name in ("wait", "read", "fold", "epilogue", "us"))
    print(f"  {'phase':<14}{columns}   predicted:{columns}")
    expected = rows(simulate(program.graph, schedule, profile))
    for name, row in rows(measured_timeline(program.graph, stamps)).items():
        print(f"  {name:<14}" + "".join(f"{x:9.1f}" for x in row) + " " * 13 + "".join(f"{x:9.1f}" for x in expected[name]))


if __name__ == "__main__":
    main()
