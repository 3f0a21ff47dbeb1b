"""Prologues: reductions over whole vectors, and the resident operand staged in shared memory as the mma wants it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mkdsl.graph import Code, Phase, depth
from mkdsl.lower._machine import Machine, Request, bf16, f32, i32, spread
from mkdsl.lower._tile import Tile
from mkdsl.lower._types import Carry, Index
from mkdsl.lower._waits import Wanted
from mkdsl.lower.evaluate._evaluator import COMBINE, fetch
from mkdsl.lower.evaluate._frames import Cell
from mkdsl.lower.mosaic import _copies
from mkdsl.lower.mosaic._layouts import THREADS, grid
from mkdsl.lower.mosaic._stores import store_blocks, store_vectors
from mkdsl.schedule import FoldPlan

REGISTERS = 80  # per thread for loads in flight: more would spill next to the mma's operands


class Sweep(NamedTuple):
    """One pass over the columns of vectors of one width: partial reductions per row, and perhaps the resident to shared memory."""

    tile: Tile
    reductions: tuple[int, ...]
    resident: int | None

    @property
    def roots(self) -> tuple[int, ...]:
        return self.reductions if self.resident is None else (*self.reductions, self.resident)


@dataclasses.dataclass
class Prologue:
    """One phase's prologue in one iteration.

    A reduction leaves one partial per row in `statistics`. `settle` completes those that a later reduction or the resident waits for; what
    only the epilogue needs it sums up itself, off the critical path.
    """

    m: Machine
    phase: Phase
    code: Code
    tile: Tile
    iteration: Index

    def __post_init__(self) -> None:
        self.unsettled: list[int] = []
        self.cells: dict[
            tuple[int, int], list[Cell]
        ] = {}  # by width, and of blocks: vectors that fit in registers are loaded once for all sweeps
        self.sweeps = self._plan()

    def _plan(self) -> list[list[Sweep]]:
        """Sweeps by depth: each depth's need the reductions of the one before."""
        depth = {r: self._depth(r) for r in self.code.stats}
        resident = self.code.resident if self.tile.k_stages == 1 and not self._copied() else None
        resident_depth = -1 if resident is None else self._depth(resident)
        out = []
        for level in range(max([resident_depth, *depth.values()], default=-1) + 1):
            reductions = [r for r in self.code.stats if depth[r] == level]
            staged = resident if level == resident_depth else None
            widths = {self._width(r) for r in reductions} | ({self.tile.k} if staged is not None else set())
            out.append([
                Sweep(self._tile(w, staged), tuple(r for r in reductions if self._width(r) == w), staged if w == self.tile.k else None)
                for w in sorted(widths, reverse=True)
            ])  # fmt: skip
        return out

    def _tile(self, width: int, staged: int | None) -> Tile:
        """What is staged is swept in the resident's own blocks."""
        return self.tile if staged is not None and width == self.tile.k else self.tile.over(width)

    def prepare(self) -> None:
        """Loads weights of the first sweeps, where they fit in registers, before anybody waits."""
        for sweep in self.sweeps[0] if self.sweeps else []:
            if self._step(sweep) == sweep.tile.blocks:
                for cell in self._kept(sweep.tile):
                    cell.prepare(sweep.roots)

    def run(self) -> None:
        """All reductions, and the resident if it is staged in one K stage."""
        for sweeps in self.sweeps:
            if self.unsettled:
                self.settle()
            for sweep in sweeps:
                self._sweep(sweep, self._first(sweep.tile))
        if self.tile.k_stages == 1 and self._copied():
            self._copy(0)
        if self.unsettled and self.tile.k_stages > 1 and self.code.resident is not None and self._depth(self.code.resident):
            self.settle()
        if self.tile.k_stages == 1:
            self._commit()

    def stage(self, k_stage: Index) -> None:
        """One K stage of a resident that has several."""
        if self._copied():
            self._copy(k_stage)
        else:
            self._sweep(Sweep(self.tile, (), self.code.resident), k_stage * self.tile.blocks)
        self._commit()

    def _commit(self) -> None:
        """Shows the tensor cores what threads have stored, where they read shared memory by themselves."""
        if isinstance(plan := self.m.schedule.plan(self.phase.name), FoldPlan) and self.m.by_wgmma(plan):
            plgpu.commit_smem()

    def _copied(self) -> bool:
        """Whether the resident is a tensor as others wrote it, which needs no registers on its way to shared memory."""
        m, name, resident = self.m, self._stored(), self.code.resident
        if m.interpret or name is None or resident is None or not self.tile.tensor_cores or m.schedule.tensor(name).dtype != "bfloat16":
            return False
        if m.graph.node(resident).width != self.tile.k:
            return False  # what fills its last tile must be masked
        return m.schedule.tensor(name).splits == 1 and _copies.stageable(m.batch * self.tile.split_k, self.tile.blocks, self.tile.width)

    def _stored(self) -> str | None:
        """The tensor that is the resident, but for its shape."""
        return None if self.code.resident is None else self.m.graph.stored(self.code.resident)

    def _copy(self, k_stage: Index) -> None:
        m, tile, name = self.m, self.tile, self._stored() or ""
        first = self._first(tile) * tile.width + k_stage * tile.stage_k
        inc = m.slot_read(name, self.phase, self.iteration)
        whole = m.refs[name].reshape(m.refs[name].shape[0], m.batch * tile.split_k, tile.k // tile.split_k)
        source = whole.at[inc, :, pl.ds(first, tile.stage_k)]
        checked = m.concurrent and m.schedule.tensor(name).handoff.self_validating
        watch = m.watch(self.phase, self.iteration, Wanted.DATA, tensors=[name])
        _copies.stage(source, m.refs[f"resident.{self.phase.name}"], tile.swizzle(8, tile.width), self_validating=checked, watch=watch)

    def _width(self, reduction: int) -> int:
        """Of what is reduced, as it is laid out."""
        return self.m.graph.tiled(self._features(reduction))

    def _features(self, reduction: int) -> int:
        return self.m.graph.node(self.m.graph.node(reduction).inputs[0]).width

    def _depth(self, id: int) -> int:
        """How many reductions, one after the other, must be complete before this can be computed."""
        return depth(self.m.graph.node, self.m.graph.tensor_of, id)

    def _leaves(self, roots: Sequence[int]) -> list[int]:
        """Tensor nodes that computing `roots` loads, not looking below other reductions."""
        found: dict[int, None] = {}
        stack = [i for r in roots for i in (self.m.graph.node(r).inputs if self.m.graph.node(r).kind == "reduce" else (r,))]
        while stack:
            id = stack.pop()
            if id in self.m.graph.tensor_of:
                found[id] = None
            elif self.m.graph.node(id).kind != "reduce":
                stack.extend(self.m.graph.node(id).inputs)
        return list(found)

    def _step(self, sweep: Sweep) -> int:
        """Blocks per iteration, as many as the registers allow."""
        tensors = [self.m.schedule.tensor(self.m.graph.tensor_of[i]) for i in self._leaves(sweep.roots)]
        tile, blocks = sweep.tile, sweep.tile.blocks
        values = max(1.0, tile.height * tile.width / THREADS) * sum(t.splits * t.itemsize / 4 for t in tensors)
        each = max(1.0, tile.column_groups * (values + sum(t.splits for t in tensors if t.splits > 1)))  # splits with their weights
        most = REGISTERS if self.tile.k_stages == 1 else REGISTERS // 2  # a resident in K stages is swept twice, and code is scarce
        return max(d for d in range(1, blocks + 1) if blocks % d == 0 and (d == 1 or d * each <= most))

    def _first(self, tile: Tile) -> Any:
        """This worker's first block of columns: of a cluster, each has as many."""
        return self.m.rank * tile.k_stages * tile.blocks if tile.cluster > 1 else 0

    def _kept(self, tile: Tile) -> list[Cell]:
        key = tile.k, tile.width
        if key not in self.cells:
            self.cells[key] = self._cells(tile, self._first(tile), tile.blocks)
        return self.cells[key]

    def _cells(self, t: Tile, first: Index, blocks: int) -> list[Cell]:
        out = []
        for b in range(blocks):
            weights: dict[int, Any] = {}  # the same for every group of sequences
            out += [
                Cell(
                    self.m,
                    self.phase,
                    self.iteration,
                    split_k=t.split_k,
                    height=t.height,
                    group=g,
                    block=first + b,
                    width=t.width,
                    k=self.m.graph.tiled(t.k),
                    weights=weights,
                )
                for g in range(t.column_groups)
            ]
        return out

    def _sweep(self, sweep: Sweep, first: Index) -> None:
        tile, step = sweep.tile, self._step(sweep)
        leaves = self._leaves(sweep.roots)
        start = [_filled(COMBINE[self.m.graph.node(r).op][2], tile) for r in sweep.reductions for _ in range(tile.column_groups)]

        def columns(j: Index, partial: Carry) -> Any:
            whole = step == tile.blocks and tile.k_stages == 1
            cells = self._kept(tile) if whole else self._cells(tile, first + j * step, step)
            fetch([(cell, leaves) for cell in cells])
            return self._columns(sweep, cells, j * step, list(partial))

        self._store_partials(sweep, self.m.times(tile.blocks // step, columns, start))

    def _columns(self, sweep: Sweep, cells: list[Cell], first: Index, partial: list[jax.Array]) -> list[jax.Array]:
        groups = sweep.tile.column_groups
        if sweep.resident is not None:
            width = self.m.graph.node(sweep.resident).width
            self._store(sweep.tile, cells, [c.masked(c.evaluate(sweep.resident), width, 0.0).astype(bf16) for c in cells], first)
        for n, r in enumerate(sweep.reductions):
            combine, _, neutral = COMBINE[self.m.graph.node(r).op]
            for cell in cells:
                where, value = n * groups + cell.group, cell.evaluate(self.m.graph.node(r).inputs[0])
                partial[where] = combine(partial[where], cell.masked(value, self._features(r), neutral))
        return partial

    def _store(self, tile: Tile, cells: list[Cell], values: list[jax.Array], first: Index) -> None:
        """Blocks of the resident; `cells` are all groups of each block from `first` on."""
        there = self.m.refs[f"resident.{self.phase.name}"]
        where = [(cell.group, at // tile.column_groups) for at, cell in enumerate(cells)]
        if not self.m.interpret:
            to = tile.swizzle(8, tile.width) if tile.tensor_cores else ()
            store_blocks(values, there, where, jnp.asarray(first, i32), layout=cells[0].layout, to=to)
            return
        for (group, block), value in zip(where, values, strict=True):
            for copy in range(8 // tile.height):
                there[group, first + block, pl.ds(copy * tile.height, tile.height)] = value

    def _store_partials(self, sweep: Sweep, partial: Sequence[jax.Array]) -> None:
        groups, height = sweep.tile.column_groups, sweep.tile.height
        values = [
            COMBINE[self.m.graph.node(r).op][1](partial[n * groups + g], axis=1)
            for n, r in enumerate(sweep.reductions)
            for g in range(groups)
        ]
        where = [(self.code.stats.index(r), height * g) for r in sweep.reductions for g in range(groups)]
        if self.m.interpret:
            for (slot, first), value in zip(where, values, strict=True):
                self.m.refs["statistics"][slot, pl.ds(first, height)] = value
        elif values:
            store_vectors(values, self.m.refs["statistics"], where, layout=grid(height, sweep.tile.width, Cell.vector).reduce(1))
        self.unsettled += sweep.reductions

    def settle(self) -> None:
        """Completes reductions over the pieces of K of each sequence; afterwards row n holds the number of sequence n // split_k."""
        m, batch, split_k = self.m, self.m.batch, self.tile.split_k
        layout = grid(batch, split_k)
        view = (m.refs["statistics"].shape[1] // (batch * split_k), batch, split_k)
        for r in self.unsettled if split_k > 1 else ():
            rows = Request(m.refs["statistics"], (self.code.stats.index(r),), view, (0, pl.ds(0, batch), pl.ds(0, split_k)), layout)
            value = COMBINE[m.graph.node(r).op][1](m.load(rows), axis=1)
            m.store(rows, spread(value, (batch, split_k), 0, layout))
        self.m.settled |= {(self.phase.name, r) for r in self.unsettled}
        self.unsettled = []


def _filled(value: float, tile: Tile) -> jax.Array:
    shape = tile.height, tile.width
    return plgpu.layout_cast(jnp.full(shape, value, f32), grid(*shape, Cell.vector))
