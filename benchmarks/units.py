"""What a fold's units cost compute, by instruction and columns: the profile's `mma_us`, `column_us`, `wgmma_us`, `wgmma_column_us`.

    python benchmarks/units.py

Runs the kernels' own loops over units that are there already: a loader that says so and copies nothing. Microseconds of a unit, its
barriers included, on every SM at once.
"""

import dataclasses
import itertools
import time
import types
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.lower import ACC, Machine, Tile, accumulate, accumulate_async, store_sums, zeros

STAGES, STAGE_BYTES = 2, 32 * 1024
SLOTS = 8  # tiles whose sums are kept
TILES, CHUNKS = 5000, 2  # units of a launch: 10,000
SHAPES = [(1, 8), (8, 1), (8, 2), (8, 4), (16, 4), (16, 8)]  # batch, parts


def kernel(batch, parts, chunk, instruction, store):
    """A launch of one CTA per SM that folds TILES tiles of CHUNKS units; returns their sums. `store`: puts each tile's sums in shared memory
    instead, "once" or "again", added to what is there."""
    tile = Tile(64 // parts, parts, chunk, 1, parts * chunk * CHUNKS, batch)
    phase: Any = types.SimpleNamespace(name="p")
    schedule: Any = types.SimpleNamespace(stages=STAGES, padded_batch=batch)
    graph: Any = None
    written, read = tile.views(STAGES, STAGE_BYTES)
    union = plgpu.RefUnion((tile.resident(),), (tile.operand(),))

    rows = (1, SLOTS, 64, batch) if batch >= 8 else (1, batch, SLOTS, 64)
    kept = dataclasses.replace(tile, pieces=2 if store == "again" else 1)

    def body(out, ring, shared, finished, full, empty):
        ((written,), (read,)), ((resident,), (operand,)) = ring, shared
        m = Machine(graph, schedule, False, True, True)
        m.refs = {
            "stage.p": (written, read),
            "resident.p": resident,
            "operand.p": operand,
            "rows.p": finished,
            "full": full,
            "empty": empty,
        }
        role = lax.axis_index("wg")

        @pl.when(role == 1)
        def _():
            def issue(i, c):
                pl.when(i >= STAGES)(lambda: plgpu.barrier_wait(empty.at[lax.rem(i, STAGES)]))
                plgpu.barrier_arrive(full.at[lax.rem(i, STAGES)])
                return c

            lax.fori_loop(0, TILES * CHUNKS, issue, 0)

        @pl.when(role == 0)
        def _():
            def one(s, total):
                i = s * CHUNKS
                sums = accumulate_async(m, phase, tile, i) if instruction == "wgmma" else accumulate(m, phase, tile, None, i)
                if store:
                    store_sums(m, phase, kept, lax.rem(s, SLOTS), sums)
                    return total
                return [a + b for a, b in zip(total, sums, strict=True)]

            shapes = [(64, 8 * tile.groups)] if instruction == "wgmma" else [(64, 8)] * tile.groups
            total = lax.fori_loop(0, TILES, one, [zeros(shape, ACC) for shape in shapes])
            out[lax.axis_index("sm")] = sum(jnp.sum(jnp.sum(x, axis=1)) for x in total)

    workers = jax.devices()[0].core_count
    return jax.jit(
        plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((workers,), jnp.float32),
            scratch_types=[
                plgpu.RefUnion((written,), (read,)),
                union,
                plgpu.SMEM(rows, jnp.float32),
                plgpu.Barrier(num_barriers=STAGES),
                plgpu.Barrier(num_barriers=STAGES),
            ],
            grid=(workers,),
            grid_names=("sm",),
            num_threads=2,
            thread_name="wg",
            compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        )
    )


def unit_us(run):
    run().block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run().block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times) / (TILES * CHUNKS) * 1e6


def main():
    print(jax.devices()[0].device_kind)
    print("us of a unit, and what storing a tile's sums takes, once and added to what is there")
    print(f"{'batch x parts':<15}{'columns':>8}{'chunk':>7}{'mma':>9}{'once':>8}{'again':>8}{'wgmma':>9}{'once':>8}{'again':>8}")
    for (batch, parts), chunk in itertools.product(SHAPES, (128, 256)):
        line = f"{f'{batch} x {parts}':<15}{max(8, batch * parts):>8}{chunk:>7}"
        for instruction in ("mma", "wgmma"):
            unit, *stored = (unit_us(kernel(batch, parts, chunk, instruction, store)) for store in (None, "once", "again"))
            line += f"{unit:>9.3f}" + "".join(f"{(us - unit) * CHUNKS:>8.3f}" for us in stored)
        print(line, flush=True)


if __name__ == "__main__":
    main()
