"""The phases of a graph: what is executed together, and the tensors that cross between them. One record per kind of phase."""

import dataclasses
import math
from collections.abc import Iterable
from typing import ClassVar

ITEMSIZE = {"bfloat16": 2, "float32": 4}
TILE = 64  # features


def tiled(width: int, head_dims: Iterable[int] = ()) -> int:
    """The width that a vector of so many features is laid out with: whole tiles, and whole heads where it is a number of heads.

    What lies behind its own features is never looked at: weights have zeros there, and who reads the vector masks it.
    """
    whole = math.lcm(TILE, *(d for d in head_dims if width % d == 0)) if width % TILE else TILE
    return -(-width // whole) * whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """An activation that crosses phases: [batch, width] in global memory, as `tiled` lays it out.

    `carried`: the layers' loop state, written in iteration i to be read in i + 1. `output`: handed to the caller, float32.
    `heads` > 0: attention's result, which a schedule may leave in splits to be merged by its readers. `rounds`: all its readers round it to
    bfloat16, so that it may cross as that.
    """

    name: str
    width: int
    rounds: bool = False
    carried: bool = False
    output: bool = False
    heads: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of one phase, in whole tiles, that are finished together. `weights` are folded row by row in step (zipped: gate and up); `writes` are tensors."""

    weights: tuple[str, ...]
    rows: int
    writes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A fused operator: a prologue, what it streams, an epilogue. What the search needs to know of it; `kind` names the subclass in print.

    reads: tensors that the prologue reads whole. row_reads: tensors of which the epilogue reads just the rows that it writes.
    reductions: how many the prologue has.
    """

    kind: ClassVar[str]
    name: str
    segment: int
    parts: tuple[Part, ...]
    reads: tuple[str, ...]
    row_reads: tuple[str, ...]
    reductions: int = 0
    where: str = ""

    @property
    def writes(self) -> tuple[str, ...]:
        return tuple(t for part in self.parts for t in part.writes)

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def streams(self) -> str:
        """The length of the streamed axis, for print."""
        return ""

    def streamed_bytes(self, batch: int) -> int:
        """Bytes of weights or cache that one execution streams."""
        raise NotImplementedError

    def flops(self, batch: int) -> int:
        """Floating-point operations of one execution, those of prologue and epilogue left out."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldPhase(Phase):
    """Weights [rows, k] streamed past a resident [k].

    k: in whole tiles, of which the weights fill the rest with zeros; of a fold that is not `parallel` as it is.
    aligned: the power of two, at most 8, of which all its weights' numbers of rows are multiples, and where in an array they begin.
    dtype: of the weights. parallel: made of `mk.dot` alone, so that a tile may be cut along k; other folds take whole rows.
    separable: nothing that the prologue stages or reduces waits for another reduction, and all of it is k wide, so that several workers can
      stage some columns each.
    """

    kind: ClassVar[str] = "fold"
    k: int
    aligned: int = 8
    dtype: str = "bfloat16"
    parallel: bool = True
    separable: bool = True

    def in_place(self, split_k: int) -> bool:
        """Whether a copy engine takes tiles of so many pieces of K from the weights where they are: it counts whole blocks of 8 pieces, so
        that a weight, of each layer, has whole ones. Else the kernel is handed a copy with more rows."""
        return self.aligned % (8 // split_k) == 0

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def streams(self) -> str:
        return f" k={self.k}"

    @property
    def matrix_rows(self) -> int:
        """Rows of all weights."""
        return sum(len(part.weights) * part.rows for part in self.parts)

    def streamed_bytes(self, batch: int) -> int:
        return self.matrix_rows * self.k * self.itemsize

    def flops(self, batch: int) -> int:
        return 2 * batch * self.matrix_rows * self.k


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionPhase(Phase):
    """A KV cache of `context` positions streamed past queries, `heads // kv_heads` of them for each kv head. dtype: of the cache. page: how many
    positions lie together, where a table says; None where all do."""

    kind: ClassVar[str] = "attention"
    context: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    window: int | None = None
    page: int | None = None

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def streams(self) -> str:
        return f" context={self.context}"

    @property
    def queries(self) -> int:
        """Query heads of one kv head."""
        return self.heads // self.kv_heads

    def blocks(self, positions: int) -> int:
        """Blocks of so many positions that the cache has; the last may be a part of one."""
        return -(-self.context // positions)

    @property
    def attended(self) -> int:
        """Positions that a query at the end of the cache attends to."""
        return min(self.context, self.window or self.context)

    def streamed_bytes(self, batch: int) -> int:
        return 2 * batch * self.kv_heads * self.attended * self.head_dim * self.itemsize

    def flops(self, batch: int) -> int:
        return 4 * batch * self.heads * self.attended * self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapPhase(Phase):
    """Values computed row block by row block. It streams nothing. reduced: the widths of the vectors that its prologue reduces."""

    kind: ClassVar[str] = "map"
    reduced: tuple[int, ...] = ()

    def streamed_bytes(self, batch: int) -> int:
        return 0

    def flops(self, batch: int) -> int:
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """Phases executed `repeats` times in a row: a loop over layers, or straight-line code (repeats = 1)."""

    phases: tuple[str, ...]
    repeats: int
