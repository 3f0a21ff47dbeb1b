"""The geometry of a fold's tiles, shared by the role that fetches them and the role that folds them."""

import dataclasses
import math

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from mkdsl.graph import FoldPhase, Node, Rows
from mkdsl.lower._types import Buffer
from mkdsl.schedule import FoldPlan

STORED = jnp.bfloat16  # what the ring and residents hold
ITEMSIZE = 2  # its bytes


@dataclasses.dataclass(frozen=True)
class Tile:
    """One fold's tiles under a plan; or how a prologue sees a vector that it reduces. rows, split_k, tile_k, k_stages, cluster: as `FoldPlan` has
    them. k: of the streamed axis. batch: padded."""

    rows: int
    split_k: int
    tile_k: int
    k_stages: int
    k: int
    batch: int
    tensor_cores: bool = True
    cluster: int = 1

    @staticmethod
    def of(phase: FoldPhase, plan: FoldPlan, batch: int) -> "Tile":
        return Tile(plan.rows, plan.split_k, plan.tile_k, plan.k_stages, phase.k, batch, phase.parallel, plan.cluster)

    def over(self, k: int) -> "Tile":
        """The same rows over a whole vector of another width."""
        return dataclasses.replace(self, k=k, tile_k=k // self.split_k // self.cluster, k_stages=1)

    @property
    def width(self) -> int:
        """Columns of a swizzled block: 128, 64 or 32 bytes."""
        return math.gcd(self.tile_k, 64)

    @property
    def block_rows(self) -> int:
        """Rows of a weight in one swizzled block, which is 8 pieces of rows high."""
        return 8 // self.split_k

    def handed(self, weight: Node) -> Rows:
        """A weight's rows in what the kernel is handed: in the array as it is, or in a copy of them with zeros behind the last."""
        rows, k = weight.rows, weight.shape[1]
        if k % self.k == rows.first % self.block_rows == rows.whole % self.block_rows == 0:
            return rows
        return Rows(0, rows.count, -(-rows.count // self.block_rows) * self.block_rows)

    @property
    def stage_k(self) -> int:
        """Elements of each mma row in one K stage of one worker."""
        return self.k // self.split_k // self.cluster // self.k_stages

    @property
    def units(self) -> int:
        """Units per tile, matrix and K stage."""
        return self.stage_k // self.tile_k

    @property
    def column_groups(self) -> int:
        """Groups of 8 columns of the mma's right-hand side: (sequence, piece of K) pairs."""
        return -(-self.batch * self.split_k // 8)

    @property
    def height(self) -> int:
        """Rows of (sequence, piece of K) in a group: 8, or all there are."""
        return min(8, self.batch * self.split_k)

    @property
    def blocks(self) -> int:
        """Blocks of `width` columns in one K stage of the resident."""
        return self.stage_k // self.width

    def swizzle(self, *tiling: int) -> tuple:
        return swizzled(tiling, ITEMSIZE * self.width)

    @property
    def written(self) -> tuple:
        """The layout of a stage [rows, split_k, tile_k], or [rows, tile_k] if split_k is 1: blocks of 8 rows of the mma."""
        outer = (8,) if self.split_k in (1, 8) else (self.block_rows, self.split_k)
        return self.swizzle(*outer, self.width)

    def views(self, num_stages: int, stage_bytes: int) -> tuple[Buffer, Buffer]:
        """(as one copy writes stages, as the mma reads them): the same bytes, the tile in the first rows of each stage."""
        height = stage_bytes // (ITEMSIZE * self.tile_k)
        read = plgpu.SMEM((num_stages, height, self.tile_k), STORED, transforms=self.swizzle(8, self.width))
        if self.split_k == 1:
            return read, read
        shape = (num_stages, height // self.split_k, self.split_k, self.tile_k)
        return plgpu.SMEM(shape, STORED, transforms=self.written), read

    def resident(self) -> Buffer:
        """The staged operand: [column groups, blocks, 8 columns, width], swizzled where tensor cores read it."""
        transforms = self.swizzle(8, self.width) if self.tensor_cores else ()
        return plgpu.SMEM((self.column_groups, self.blocks, 8, self.width), STORED, transforms=transforms)

    def operand(self) -> Buffer:
        """The same bytes as `wgmma` reads them: [columns, elements of a K stage]."""
        return plgpu.SMEM((8 * self.column_groups, self.stage_k), STORED, transforms=self.swizzle(8, self.width))


def kv_view(num_stages: int, stage_bytes: int, head_dim: int) -> Buffer:
    """A stage as a block of keys or of values: [positions, head_dim]."""
    return plgpu.SMEM((num_stages, stage_bytes // (ITEMSIZE * head_dim), head_dim), STORED, transforms=kv_written(head_dim))


def kv_written(head_dim: int) -> tuple:
    """The layout of a block of keys or of values: swizzled blocks as wide as whole ones fill a head."""
    width = math.gcd(head_dim, 64)
    return swizzled((8, width), ITEMSIZE * width)


def swizzled(tiling: tuple[int, ...], bytes: int) -> tuple:
    """The layout of shared memory that TMA writes and the mma reads without bank conflicts."""
    return plgpu.TilingTransform(tiling), plgpu.SwizzleTransform(bytes)  # pyright: ignore[reportAbstractUsage]
