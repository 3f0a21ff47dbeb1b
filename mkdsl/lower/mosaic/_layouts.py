"""Register layouts: which thread of a warpgroup holds which element. Lane semantics takes every layout as written."""

import functools
import math
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array as fa

THREADS = 128  # of a warpgroup
LHS, RHS, ACC = (layout(jnp.bfloat16) for layout in (plgpu.Layout.MMA_LHS, plgpu.Layout.MMA_RHS, plgpu.Layout.MMA_ACC))


def _tiled(tiling: tuple[tuple[int, ...], ...], warps: tuple, lanes: tuple) -> Any:
    layout = fa.TiledLayout(fa.Tiling(tiling), warps, lanes, -1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


@functools.cache
def grid(m: int, n: int, vector: int = 1) -> Any:
    """[m, n] spread row by row over as many of the 128 threads as it fills, `vector` adjacent elements each where n allows.

    A tile of 128 * vector elements (m rows, as wide as it takes) repeats along n; where m is no power of two rows stay in registers.
    Small arrays are replicated over the threads that are left.
    """
    rows = min(m & -m, THREADS)
    width = n & -n
    while vector > 1 and THREADS * vector // rows > width:
        vector //= 2
    columns = min(width // vector, THREADS // rows)  # threads along n
    warp_rows = min(4, rows)
    warp_columns = min(4 // warp_rows, columns)
    lane_rows, lane_columns = rows // warp_rows, columns // warp_columns
    warps: tuple = (-6, -5) if warp_rows * warp_columns > 1 else ()
    lanes: tuple = (-4, -3)
    if (spare := 4 // (warp_rows * warp_columns)) > 1:
        warps = (fa.Replicated(spare), *warps)
    if (spare := 32 // (lane_rows * lane_columns)) > 1:
        lanes = (fa.Replicated(spare), *lanes)
    tile = (rows, columns * vector)
    return _tiled((tile, (lane_rows, lane_columns * vector), (1, vector)), warps or (fa.Replicated(4),), lanes)


def registers(m: int, n: int) -> int:
    """32-bit registers a thread needs for float32 [m, n] in `grid(m, n)`."""
    return math.ceil(m * n / THREADS)
