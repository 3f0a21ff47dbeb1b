"""What a fold's units cost compute, by instruction and columns: the profile's `mma_us`, `column_us`, `wgmma_us`, `wgmma_column_us`.

    python benchmarks/units.py

Runs the kernels' own loops over units that are there already: a loader that says so and copies nothing. Microseconds of a unit, its
barriers included, on every SM at once.
"""

import argparse
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

from mkdsl.lower import Machine, Tile, zeros
from mkdsl.lower.mosaic import ACC
from mkdsl.lower.phases import accumulate, accumulate_async, store_sums

NUM_STAGES, STAGE_BYTES = 2, 32 * 1024
SLOTS = 8  # tiles whose sums are kept
TILES, UNITS = 5000, 2  # of a launch, and of a tile: 10,000 units
SHAPES = [(1, 8), (8, 1), (8, 2), (8, 4), (16, 4), (16, 8)]  # batch, split_k


def kernel(batch: int, split_k: int, tile_k: int, instruction: str, store: str | None) -> Any:
    """A launch of one CTA per SM that folds TILES tiles of UNITS units; returns their sums. `store`: puts each tile's sums in shared memory
    instead, "once" or "again", added to what is there."""
    tile = Tile(64 // split_k, split_k, tile_k, 1, split_k * tile_k * UNITS, batch)
    phase: Any = types.SimpleNamespace(name="p")
    schedule: Any = types.SimpleNamespace(num_stages=NUM_STAGES, padded_batch=batch)
    graph: Any = None
    written, read = tile.views(NUM_STAGES, STAGE_BYTES)
    union = plgpu.RefUnion((tile.resident(),), (tile.operand(),))

    sums = (1, SLOTS, 64, batch) if batch >= 8 else (1, batch, SLOTS, 64)
    kept = dataclasses.replace(tile, k_stages=2 if store == "again" else 1)

    def body(out, ring, shared, kept_sums, full, empty):
        ((written,), (read,)), ((resident,), (operand,)) = ring, shared
        m = Machine(graph, schedule, interpret=False, concurrent=True, tma=True)
        m.refs = {
            "written.p": written,
            "read.p": read,
            "resident.p": resident,
            "operand.p": operand,
            "sums.p": kept_sums,
            "full": full,
            "empty": empty,
        }
        role = lax.axis_index("wg")

        @pl.when(role == 1)
        def _():
            def issue(i, c):
                pl.when(i >= NUM_STAGES)(lambda: plgpu.barrier_wait(empty.at[lax.rem(i, NUM_STAGES)]))
                plgpu.barrier_arrive(full.at[lax.rem(i, NUM_STAGES)])
                return c

            lax.fori_loop(0, TILES * UNITS, issue, 0)

        @pl.when(role == 0)
        def _():
            def one(s, total):
                i = s * UNITS
                found = accumulate_async(m, phase, tile, i) if instruction == "wgmma" else accumulate(m, phase, tile, None, i)
                if store:
                    store_sums(m, phase, kept, lax.rem(s, SLOTS), found)
                    return total
                return [a + b for a, b in zip(total, found, strict=True)]

            shapes = [(64, 8 * tile.column_groups)] if instruction == "wgmma" else [(64, 8)] * tile.column_groups
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
                plgpu.SMEM(sums, jnp.float32),
                plgpu.Barrier(num_barriers=NUM_STAGES),
                plgpu.Barrier(num_barriers=NUM_STAGES),
            ],
            grid=(workers,),
            grid_names=("sm",),
            num_threads=2,
            thread_name="wg",
            compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        )
    )


def unit_us(run: Any) -> float:
    run().block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run().block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times) / (TILES * UNITS) * 1e6


def main() -> None:
    argparse.ArgumentParser(description="Times a fold's units on the GPU at hand.").parse_args()
    print(jax.devices()[0].device_kind)
    print("us of a unit, and what storing a tile's sums takes, once and added to what is there")
    print(f"{'batch x split_k':<17}{'columns':>8}{'tile_k':>8}{'mma':>9}{'once':>8}{'again':>8}{'wgmma':>9}{'once':>8}{'again':>8}")
    for (batch, split_k), tile_k in itertools.product(SHAPES, (128, 256)):
        line = f"{f'{batch} x {split_k}':<17}{max(8, batch * split_k):>8}{tile_k:>8}"
        for instruction in ("mma", "wgmma"):
            unit, *stored = (unit_us(kernel(batch, split_k, tile_k, instruction, store)) for store in (None, "once", "again"))
            line += f"{unit:>9.3f}" + "".join(f"{(us - unit) * UNITS:>8.3f}" for us in stored)
        print(line, flush=True)


if __name__ == "__main__":
    main()
