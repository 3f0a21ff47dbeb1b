"""Prologues: reductions over whole vectors, and the resident operand staged in shared memory as the mma wants it."""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.graph import Code, Phase
from mkdsl.lower._frames import COMBINE, Cell, fetch
from mkdsl.lower._layouts import grid
from mkdsl.lower._machine import Machine, Request, bf16, f32, i32, spread, times
from mkdsl.lower._tiles import Tile

REGISTERS = 64  # per thread for loads in flight: more would spill next to the mma's operands


@dataclasses.dataclass
class Prologue:
    """One phase's prologue in one iteration.

    A reduction leaves one partial per row in `statistics`. `settle` completes those that a later reduction or the resident waits for; what
    only the finish needs it sums up itself, off the critical path.
    """

    m: Machine
    phase: Phase
    code: Code
    tile: Tile
    l: Any

    def __post_init__(self) -> None:
        self.unsettled: list[int] = []

    def run(self) -> None:
        """All reductions, and the resident if it is staged in one piece."""
        whole = self.tile.pieces == 1
        depth = {r: self._depth(r) for r in self.code.stats}
        resident_depth = -1 if self.code.resident is None or not whole else self._depth(self.code.resident)
        last = max([resident_depth, *depth.values()], default=-1)
        for level in range(last + 1):
            if self.unsettled:
                self.settle()
            resident = self.code.resident if level == resident_depth else None
            reductions = [r for r in self.code.stats if depth[r] == level]
            widths = {self._width(r) for r in reductions} | ({self.tile.k} if resident is not None else set())
            for width in sorted(widths, reverse=True):
                tile = self.tile.over(width)
                self._sweep([r for r in reductions if self._width(r) == width], resident if width == self.tile.k else None, 0, tile)

    def stage(self, piece: Any) -> None:
        """One piece of a resident that is staged in several."""
        self._sweep([], self.code.resident, piece * self.tile.blocks, self.tile)

    def _width(self, reduction: int) -> int:
        return self.m.graph.node(self.m.graph.node(reduction).inputs[0]).width

    def _depth(self, id: int) -> int:
        """How many reductions, one after the other, must be complete before this can be computed."""
        if id in self.m.graph.tensor_of:
            return 0
        inputs = self.m.graph.node(id).inputs
        return max((self._depth(i) + (self.m.graph.node(i).kind == "reduce") for i in inputs), default=0)

    def _leaves(self, roots: list[int]) -> list[int]:
        """Tensor nodes that computing `roots` loads, not looking below reductions."""
        found: dict[int, None] = {}
        stack = [i for r in roots for i in (self.m.graph.node(r).inputs if self.m.graph.node(r).kind == "reduce" else (r,))]
        while stack:
            id = stack.pop()
            if id in self.m.graph.tensor_of:
                found[id] = None
            elif self.m.graph.node(id).kind != "reduce":
                stack.extend(self.m.graph.node(id).inputs)
        return list(found)

    def _sweep(self, reductions: list[int], resident: int | None, first: Any, tile: Tile) -> None:
        """One pass over the columns: partial reductions per row, and the resident to shared memory."""
        roots = [*reductions, *([] if resident is None else [resident])]
        leaves = self._leaves(roots)
        step = self._step(leaves, tile)
        kinds = [COMBINE[self.m.graph.node(r).op] for r in reductions]
        layout = Cell(self.m, self.phase, self.l, width=tile.width).layout.reduce(1)
        start = [_vector(init, layout) for _, _, init in kinds for _ in range(self.tile.groups)]

        def columns(j: Any, partial: list[jax.Array]) -> list[jax.Array]:
            cells = [self._cell(tile, g, first + j * step + b) for b in range(step) for g in range(self.tile.groups)]
            fetch([(cell, leaves) for cell in cells])
            for at, cell in enumerate(cells):
                if resident is not None:
                    block = j * step + at // self.tile.groups
                    self.m.refs[f"resident.{self.phase.name}"][cell.group, block] = cell.evaluate(resident).astype(bf16)
                for n, r in enumerate(reductions):
                    combine, reduce, _ = kinds[n]
                    where = n * self.tile.groups + cell.group
                    partial[where] = combine(partial[where], reduce(cell.evaluate(self.m.graph.node(r).inputs[0]), axis=1))
            return partial

        partial = times(tile.blocks // step, columns, start)
        self._store_partials(reductions, partial)

    def _cell(self, t: Tile, group: int, block: Any) -> Cell:
        return Cell(self.m, self.phase, self.l, parts=t.parts, group=group, block=block, width=t.width, k=t.k)

    def _step(self, leaves: list[int], tile: Tile) -> int:
        """Blocks per pass of the loop, as many as the registers allow."""
        tensors = [self.m.schedule.tensor(self.m.graph.tensor_of[i]) for i in leaves]
        blocks = tile.blocks
        each = max(1, tile.width // 16) * tile.groups * max(1, sum(t.splits for t in tensors))
        return max(d for d in range(1, blocks + 1) if blocks % d == 0 and (d == 1 or d * each <= REGISTERS))

    def _store_partials(self, reductions: list[int], partial: list[jax.Array]) -> None:
        for n, r in enumerate(reductions):
            slot = self.code.stats.index(r)
            for g in range(self.tile.groups):
                self.m.refs["statistics"][slot, pl.ds(8 * g, 8)] = partial[n * self.tile.groups + g]
            self.unsettled.append(r)

    def settle(self) -> None:
        """Completes reductions over the parts of each sequence; afterwards row n holds sequence n // parts' number."""
        m, batch, parts = self.m, self.m.batch, self.tile.parts
        layout = grid(batch, parts)
        for r in self.unsettled:
            slot = self.code.stats.index(r)
            _, reduce, _ = COMBINE[m.graph.node(r).op]
            view = (m.refs["statistics"].shape[1] // (batch * parts), batch, parts)
            rows = Request(m.refs["statistics"], (slot,), None, (), layout)
            value = reduce(m.load(_part_of(rows, view, 0)), axis=1)
            for copy in range(self.tile.groups * 8 // (batch * parts)):
                m.store(_part_of(rows, view, copy), spread(value, (batch, parts), 0, layout))
        self.m.settled |= {(self.phase.name, r) for r in self.unsettled}
        self.unsettled = []


def _part_of(rows: Request, view: tuple[int, int, int], copy: int) -> Request:
    return rows._replace(view=view, index=(copy, pl.ds(0, view[1]), pl.ds(0, view[2])))


def _vector(value: float, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full((8,), value, f32), layout)
