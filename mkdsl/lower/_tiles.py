"""The geometry of a fold's tiles, shared by the role that fetches them and the role that folds them."""

import dataclasses
import math

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from mkdsl.graph import Phase
from mkdsl.search import PhasePlan

ROWS = 64  # of the mma's left-hand side


@dataclasses.dataclass(frozen=True)
class Tile:
    """One fold's tiles under a plan. `width`: columns of a swizzled block (128, 64 or 32 bytes)."""

    rows: int
    parts: int
    chunk: int
    pieces: int
    k: int
    batch: int
    tensor_cores: bool = True
    cluster: int = 1

    @staticmethod
    def of(phase: Phase, plan: PhasePlan, batch: int) -> "Tile":
        return Tile(plan.rows, plan.parts, plan.chunk, plan.pieces, phase.k, batch, phase.parallel, plan.cluster)

    def over(self, k: int) -> "Tile":
        """The same rows over a whole vector of another width."""
        return dataclasses.replace(self, k=k, chunk=k // self.parts // self.cluster, pieces=1)

    @property
    def width(self) -> int:
        return math.gcd(self.chunk, 64)

    @property
    def piece(self) -> int:
        """Elements of one part in one piece of the resident, of one worker of the cluster."""
        return self.k // self.parts // self.cluster // self.pieces

    @property
    def chunks(self) -> int:
        """Units per tile, matrix and piece."""
        return self.piece // self.chunk

    @property
    def groups(self) -> int:
        """Groups of 8 columns of the mma's right-hand side: (sequence, part) pairs."""
        return -(-self.batch * self.parts // 8)

    @property
    def height(self) -> int:
        """Rows of (sequence, part) in a group: 8, or all there are."""
        return min(8, self.batch * self.parts)

    @property
    def blocks(self) -> int:
        """Blocks of `width` columns in one piece of the resident."""
        return self.piece // self.width

    def swizzle(self, *tiling: int) -> tuple:
        return swizzled(tiling, 2 * self.width)

    @property
    def written(self) -> tuple:
        """The layout of a stage [rows, parts, chunk], or [rows, chunk] if there is one part: blocks of 8 rows of the mma."""
        outer = (8,) if self.parts in (1, 8) else (8 // self.parts, self.parts)
        return self.swizzle(*outer, self.width)

    def views(self, stages: int, stage_bytes: int) -> tuple:
        """(as one copy writes stages, as the mma reads them): the same bytes, the tile in the first rows of each stage."""
        height = stage_bytes // (2 * self.chunk)
        read = plgpu.SMEM((stages, height, self.chunk), jnp.bfloat16, transforms=self.swizzle(8, self.width))
        if self.parts == 1:
            return read, read
        shape = (stages, height // self.parts, self.parts, self.chunk)
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=self.written), read

    def resident(self) -> object:
        """The staged operand: [groups, blocks, 8 columns, width], swizzled where tensor cores read it."""
        transforms = self.swizzle(8, self.width) if self.tensor_cores else ()
        return plgpu.SMEM((self.groups, self.blocks, 8, self.width), jnp.bfloat16, transforms=transforms)

    def operand(self) -> object:
        """The same bytes as `wgmma` reads them: [columns, elements of a piece]."""
        return plgpu.SMEM((8 * self.groups, self.piece), jnp.bfloat16, transforms=self.swizzle(8, self.width))


def kv_view(stages: int, stage_bytes: int, head_dim: int) -> object:
    """A stage as a block of keys or of values: [positions, head_dim]."""
    return plgpu.SMEM((stages, stage_bytes // (2 * head_dim), head_dim), jnp.bfloat16, transforms=KV_WRITTEN)


def swizzled(tiling: tuple[int, ...], bytes: int) -> tuple:
    """The layout of shared memory that TMA writes and the mma reads without bank conflicts."""
    return plgpu.TilingTransform(tiling), plgpu.SwizzleTransform(bytes)  # pyright: ignore[reportAbstractUsage]


KV_WRITTEN = swizzled((8, 64), 128)
