"""Kernels that measure a GPU: a stream that nobody reads, and rounds of grid-wide hand-offs under it.

Both stream as a decode kernel's loader does, through TMA with a few units in flight. A hand-off is the decode kernel's too: store,
count up, wait, read everything. Every wait is bounded: a hand-off that fails ends the kernel with a flag instead of hanging the GPU.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf, vector

from mkdsl.lower.mosaic import SCALAR, Item, count_up, grid, load_relaxed

f32, i32 = jnp.float32, jnp.int32
KIB = 1024
BLOCK = (16, 128)  # words of a unit: 8 KiB in rows of 512 bytes, so that windows are fine-grained and TMA's issue rate is no limit
UNIT_KIB = 4 * BLOCK[0] * BLOCK[1] // KIB
MOST = 20  # units in flight: 160 KiB, which also keeps a second CTA off the SM
ROUNDS, WARM = 400, 50  # the first rounds, in which workers start and the stream fills, are not timed
POLLS = 1 << 20  # looks before a wait gives up: about a second
UNITS = 1 << 22  # of one worker, before a stream ends by itself: 32 GiB
SHARES = 128  # of a vector that is handed over
COMPUTE, LOADER = 0, 1
STARTED, ENDED, ARRIVED, AGAIN, COLUMNS = 0, 1, 2, 3, 4  # a worker's row of results


@dataclasses.dataclass(frozen=True)
class Ring:
    """The loader's side: unit i of worker w is block i * workers + w of the source, and lands in stage i % in_flight."""

    source: Any
    stages: Any
    full: Any
    in_flight: Any
    workers: int

    def issue(self, i: Any) -> None:
        """Fetches unit i once unit i - in_flight has landed."""
        slot = lax.rem(i, self.in_flight)
        pl.when(i >= self.in_flight)(lambda: plgpu.barrier_wait(self.full.at[slot]))
        block = lax.rem(i * self.workers + lax.axis_index("sm"), self.source.shape[0])
        plgpu.copy_gmem_to_smem(self.source.at[block], self.stages.at[slot], self.full.at[slot])

    def drain(self, n: Any) -> None:
        """Waits for what is in flight after n units."""

        def landed(i: Any, _: Any) -> Any:
            plgpu.barrier_wait(self.full.at[lax.rem(i, self.in_flight)])
            return _

        lax.fori_loop(jnp.maximum(n - self.in_flight, 0), n, landed, i32(0))


def stream(workers: int, units: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A kernel that streams `units` units a worker.

    Called with (source int32 [blocks, *BLOCK], in_flight int32 [1], 1 to MOST), it returns the results [workers, COLUMNS] (STARTED and
    ENDED, nanoseconds modulo 2^32) and the stages as they end [workers, MOST, *BLOCK], of which the first `in_flight` are written.
    """

    def body(source: Any, in_flight: Any, out: Any, landed: Any, stages: Any, full: Any) -> None:
        ring = Ring(source, stages, full, in_flight[0], workers)
        stamp(out, STARTED)
        lax.fori_loop(0, units, lambda i, c: (ring.issue(i), c)[1], i32(0))
        ring.drain(i32(units))
        stamp(out, ENDED)
        worker = lax.axis_index("sm")
        lax.fori_loop(0, in_flight[0], lambda s, c: (plgpu.copy_smem_to_gmem(stages.at[s], landed.at[worker, s]), c)[1], i32(0))
        plgpu.wait_smem_to_gmem(0)

    out = [_results(workers), jax.ShapeDtypeStruct((workers, MOST, *BLOCK), i32)]
    return jax.jit(_kernel(body, workers, out, _ring_types()))


@functools.cache
def handoff(workers: int, kib: int, *, release: bool) -> Callable[..., jax.Array]:
    """A kernel of ROUNDS hand-offs of a vector of `kib` KiB, to which all workers contribute and which all read.

    Called with (source int32 [blocks, *BLOCK], in_flight int32 [1], 0 to MOST: units kept in flight meanwhile), it returns the results
    int32 [workers, COLUMNS]: STARTED and ENDED around the rounds after WARM (nanoseconds modulo 2^32), ARRIVED (1, or 0 if something
    never came), AGAIN (how often data was looked at in vain).

    In round r every word becomes r, in one of two slots: who writes round r + 2 has seen all count r + 1 up, and so have read r. Data thus
    proves itself without being cleared. With `release`, counters order it, and no look may be in vain.
    """

    def body(source: Any, in_flight: Any, vector: Any, counter: Any, out: Any, stages: Any, full: Any, stop: Any) -> None:
        role = lax.axis_index("wg")

        @pl.when(role == LOADER)
        def _() -> None:
            _stream_until(stop, Ring(source, stages, full, in_flight[0], workers))

        @pl.when(role == COMPUTE)
        def _() -> None:
            one = functools.partial(_round, vector, counter, workers, release)
            state = lax.fori_loop(1, 1 + WARM, one, (i32(1), i32(0)))
            stamp(out, STARTED)
            state = lax.fori_loop(1 + WARM, 1 + ROUNDS, one, state)
            stamp(out, ENDED)
            _store(out, ARRIVED, state[0])
            _store(out, AGAIN, state[1])
            plgpu.barrier_arrive(stop)

    kernel = _kernel(body, workers, [_results(workers)], [*_ring_types(), plgpu.Barrier()], num_threads=2, thread_name="wg")

    def run(source: jax.Array, in_flight: jax.Array) -> jax.Array:
        (out,) = kernel(source, in_flight, jax.new_ref(jnp.zeros((2, 1, kib * KIB // 4), f32)), jax.new_ref(jnp.zeros((1,), i32)))
        return out

    return jax.jit(run)


def _kernel(body: Callable[..., None], workers: int, out: list[Any], scratch: Sequence[Any], **threads: Any) -> Callable[..., Any]:
    lane = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
    return plgpu.kernel(body, out_type=out, scratch_types=scratch, grid=(workers,), grid_names=("sm",), compiler_params=lane, **threads)


def _ring_types() -> tuple[Any, Any]:
    return plgpu.SMEM((MOST, *BLOCK), i32), plgpu.Barrier(num_barriers=MOST)


def _results(workers: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((workers * COLUMNS,), i32)


def _cell(out: Any, column: int) -> Any:
    return out.at[pl.ds(lax.axis_index("sm") * COLUMNS + column, 1)]


def _store(out: Any, column: int, value: Any) -> None:
    out[lax.axis_index("sm") * COLUMNS + column] = value


def _stream_until(stop: Any, ring: Ring) -> None:
    """Streams until somebody arrives at `stop`; not at all with a in_flight of 0."""

    def one(state: Any) -> Any:
        ring.issue(state[0])
        return state[0] + 1, plgpu.barrier_test(stop)

    n, _ = lax.while_loop(lambda s: (s[0] < UNITS) & ~s[1], one, (i32(0), ring.in_flight == 0))
    ring.drain(n)


def _round(vector: Any, counter: Any, workers: int, release: bool, r: Any, state: Any) -> Any:
    """One hand-off; state is (whether all arrived so far, looks in vain). After the first failure nobody waits any more."""
    arrived, again = state
    slot, words = lax.rem(r, 2), vector.shape[2]
    _contribute(vector.at[slot], workers, r)
    count_up(counter, release=release)
    limit = arrived * POLLS
    limit = limit * reached(counter, r * workers, limit, acquire=release)

    def look(seen: Any) -> Any:
        item = Item(vector.at[slot], (1, words), f32, grid(1, words, 4))
        (data,) = load_relaxed([item])
        return all_equal(data, r.astype(f32), item.layout), seen[1] + 1

    arrived, looks = lax.while_loop(lambda s: (s[0] == 0) & (s[1] < limit), look, (i32(0), i32(0)))
    return arrived, again + jnp.maximum(looks - 1, 0)


def _contribute(vector: Any, workers: int, r: Any) -> None:
    """Writes this worker's shares of a vector [1, words]: shares w, w + workers, ..."""
    size, worker = vector.shape[1] // SHARES, lax.axis_index("sm")

    def write(k: Any, _: Any) -> Any:
        value = plgpu.layout_cast(jnp.full((1, size), r.astype(f32), f32), grid(1, size))
        vector.at[pl.ds(0, 1), pl.ds((worker + k * workers) * size, size)][...] = value
        return _

    lax.fori_loop(0, lax.div(SHARES - 1 - worker + workers, workers), write, i32(0))


# PTX.


def stamp(out: Any, column: int) -> None:
    """Writes the time, once all threads of the warpgroup are here."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def go(ctx: Any, ref: Any) -> None:
        mu.warpgroup_barrier()
        one = mu.single_thread_predicate(mu.ThreadSubset.WARPGROUP)
        mu.inline_ptx("st.global.u32 [$0], $1;", mu.memref_ptr(ref), mu.globaltimer("low"), predicate=one, has_side_effects=True)

    go(_cell(out, column))  # pyright: ignore[reportCallIssue]


def reached(counter: Any, target: Any, limit: Any, *, acquire: bool) -> jax.Array:
    """One thread looks at the counter until it is at least `target`, at most `limit` times; 1 for all threads if it was, else 0."""
    order = "acquire" if acquire else "relaxed"

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR), return_type=_SCALAR_RESULT)
    def go(ctx: Any, ref: Any, target: Any, limit: Any) -> Any:
        word = ir.IntegerType.get_signless(32)
        leader = scf.IfOp(mu.single_thread_predicate(mu.ThreadSubset.WARPGROUP), [word], has_else=True)
        with ir.InsertionPoint(leader.then_block):
            loop = scf.WhileOp([word], [limit.registers.item()])
            with ir.InsertionPoint.at_block_begin(loop.before.blocks.append(word)):
                left = loop.before.blocks[0].arguments[0]
                seen = mu.inline_ptx(f"ld.{order}.gpu.global.b32 $0, [$1];", mu.memref_ptr(ref), result_types=word, has_side_effects=True)
                missing = arith.cmpi(arith.CmpIPredicate.slt, seen, target.registers.item())
                scf.condition(arith.andi(missing, arith.cmpi(arith.CmpIPredicate.sgt, left, mu.c(0, word))), [left])
            with ir.InsertionPoint.at_block_begin(loop.after.blocks.append(word)):
                scf.yield_([arith.subi(loop.after.blocks[0].arguments[0], mu.c(1, word))])
            scf.yield_(loop.results)
        assert leader.else_block is not None
        with ir.InsertionPoint(leader.else_block):
            scf.yield_([mu.c(1, word)])
        return _vote(arith.cmpi(arith.CmpIPredicate.sgt, leader.results[0], mu.c(0, word)))

    return go(counter, target, limit)  # pyright: ignore[reportCallIssue]


def all_equal(data: jax.Array, value: Any, layout: Any) -> jax.Array:
    """1 for all threads of the warpgroup if every word is `value`, else 0."""

    @plgpu.inline_mgpu(arg_types=(layout, SCALAR), return_type=_SCALAR_RESULT)
    def go(ctx: Any, data: Any, value: Any) -> Any:
        same = (data == value.broadcast(data.shape)).registers.flatten()
        return _vote(functools.reduce(arith.andi, [bit for s in same for bit in _bits(s)]))

    return go(data, value)  # pyright: ignore[reportCallIssue]


_SCALAR_RESULT = plgpu.ShapeDtypeStruct((), i32, layout=SCALAR)


def _bits(register: ir.Value) -> list[ir.Value]:
    return [vector.extract(register, [], [i]) for i in range(ir.VectorType(register.type).shape[0])]


def _vote(mine: ir.Value) -> fa.FragmentedArray:
    """1 if this is true in all threads of the warpgroup, else 0. A barrier, too."""
    word = ir.IntegerType.get_signless(32)
    ptx = "{ .reg .pred p; setp.ne.s32 p, $1, 0; barrier.red.and.pred p, $2, 128, p; selp.s32 $0, 1, 0, p; }"
    barrier = mu.warpgroup_barrier_idx(sync=False)
    all_of_them = mu.inline_ptx(ptx, arith.extui(word, mine), barrier, result_types=word, has_side_effects=True, convergent=True)
    return fa.FragmentedArray.splat(all_of_them, (), is_signed=True)
