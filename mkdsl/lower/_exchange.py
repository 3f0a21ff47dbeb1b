"""What the workers of a thread-block cluster send each other: a fold split over them along K, or an attention's items along positions.

Each folds the tiles of all, its peers' first, past its own K stage of the resident, and sends each sum to the tile's owner, whose epilogue adds
what all have sent. What is sent travels by `st.async`, which counts its bytes on a barrier of the receiver's: it neither queues behind the
stream nor needs a fence.

Rounds alternate between two barriers and, where a phase has several, two sets of buffers. In each round everyone sends everyone at least a
word, at its end. So a worker that has received all of round n + 1 knows that its peers have used what they received in round n, and may send
in round n + 2. A phase's first round needs more: that every peer is done with all phases before, which is proven of a schedule's waits
(`proof.exchanges`).
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from mkdsl.graph import FoldPhase, Phase
from mkdsl.lower._machine import Machine, i32
from mkdsl.lower._types import Context, Index, Ref
from mkdsl.lower._waits import Wanted
from mkdsl.lower.mosaic._deadline import Poll, gave_up, passed
from mkdsl.lower.mosaic._layouts import ACC, THREADS
from mkdsl.lower.mosaic._ptx import SCALAR, constant, thread_idx
from mkdsl.lower.mosaic._stores import diagonal
from mkdsl.schedule import MMA_ROWS, FoldPlan

WORDS = 8  # two barriers of two words each, how many rounds have been, and a word that tells nothing
ROUNDS, TOKEN = 4, 5


def start(m: Machine) -> None:
    """Before anything is sent: all threads of a cluster, once."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def go(ctx: Context, exchange: Ref) -> None:
        one = mu.single_thread_predicate(mu.ThreadSubset.BLOCK)
        for barrier in range(2):
            at = mu.getelementptr(mu.memref_ptr(exchange), [2 * barrier], ir.IntegerType.get_signless(32))
            nvvm.mbarrier_init(at, constant(1), predicate=one)
        mu.inline_ptx("st.shared.b32 [$0], $1;", _address(exchange, constant(ROUNDS)), constant(0), predicate=one, has_side_effects=True)
        mu.inline_ptx("fence.mbarrier_init.release.cluster;", has_side_effects=True)
        mu.inline_ptx("barrier.cluster.arrive.release.aligned;", has_side_effects=True)
        mu.inline_ptx("barrier.cluster.wait.acquire.aligned;", has_side_effects=True)

    go(m.refs["exchange"])  # pyright: ignore[reportCallIssue]


def finish(m: Machine) -> None:
    """After everything, all threads of a cluster, once: nobody's shared memory may go while a peer that has given up its waits sends to it."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def go(ctx: Context, words: Ref) -> None:
        mu.inline_ptx("barrier.cluster.arrive.release.aligned;", has_side_effects=True, convergent=True)
        mu.inline_ptx("barrier.cluster.wait.acquire.aligned;", has_side_effects=True, convergent=True)
        with mu.when(passed(words)):  # what is still under way arrives meanwhile
            mu.inline_ptx("nanosleep.u32 1000000;", has_side_effects=True)

    go(m.watched)  # pyright: ignore[reportCallIssue]


def round_number(m: Machine) -> jax.Array:
    """How many rounds this worker has been through."""
    return m.refs["exchange"][ROUNDS]


def buffer(m: Machine, phase: Phase, number: Index, source: Ref) -> Any:
    """Which set of a phase's sums holds what a worker of the cluster sends in a round."""
    plan = m.schedule.plan(phase.name)
    return (lax.rem(number, 2) * plan.cluster if plan.several_epilogues else 0) + source


def announce(m: Machine, phase: Phase, number: jax.Array, tiles: Index, begins: Index | None) -> None:
    """Says what a round brings: the sums of so many of this worker's tiles from each of its cluster, 64 values of every sequence each. In a round
    with which the phase `begins` (None: never) partial reductions are sent and expected too."""
    plan, statistics = m.schedule.plan(phase.name), len(m.graph.code[phase.name].stats)
    words = tiles * (MMA_ROWS * m.batch)
    if statistics and begins is not None:
        words = words + jnp.where(begins, m.refs["statistics"].size, 0)
        pl.when(begins)(lambda: _send_statistics(m, number, plan.cluster))
    expect(m, number, words * plan.cluster)


def _send_statistics(m: Machine, number: jax.Array, cluster: int) -> None:
    """This worker's partial reductions to the whole cluster."""
    here, there = m.refs["statistics"].reshape(-1), m.refs["received"].at[m.rank].reshape(-1)
    for peer in range(cluster):
        send_array(m, here, there, number, peer)


def expect(m: Machine, number: jax.Array, words: Index) -> None:
    """Says how many words a round brings, besides everyone's last."""
    watched = _watched(m)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR, *(plgpu.RefType() for _ in watched)))
    def go(ctx: Context, exchange: Ref, which: Index, size: Index, *watched: Ref) -> None:
        one = mu.single_thread_predicate(mu.ThreadSubset.WARPGROUP)
        barrier, size = _address(exchange, _twice(which)), size.registers.item()
        with _taking_part(watched):
            mu.inline_ptx("mbarrier.arrive.expect_tx.shared.b64 _, [$0], $1;", barrier, size, predicate=one, has_side_effects=True)

    go(m.refs["exchange"], lax.rem(number, 2), jnp.asarray(4 * (words + m.schedule.cluster), i32), *watched)  # pyright: ignore[reportCallIssue]


def receive(m: Machine, phase: Phase, iteration: Index, number: jax.Array) -> None:
    """Sends a last word to everyone and waits for all that a round brings; then the next one can begin."""
    poll = Poll(m.watch(phase, iteration, Wanted.PEERS))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR, *poll.types))
    def go(ctx: Context, exchange: Ref, which: Index, parity: Index, *watch: Any) -> None:
        here, peer = _barrier(exchange, which), thread_idx()
        with _taking_part(watch[:1]), mu.when(arith.cmpi(arith.CmpIPredicate.ult, peer, constant(m.schedule.cluster))):
            _send(_remote(_address(exchange, constant(TOKEN)), peer), [peer], _remote(_address(exchange, _twice(which)), peer))
        if watch:
            poll.until_there([], lambda: (_missing(here, parity.registers.item()), []), *watch)
            return
        at = mu.BarrierRef(here, constant(0), constant(0), 1)
        at.wait_parity(arith.trunci(ir.IntegerType.get_signless(1), parity.registers.item()))

    go(m.refs["exchange"], lax.rem(number, 2), lax.rem(lax.div(number, 2), 2), *poll.values)  # pyright: ignore[reportCallIssue]
    m.refs["exchange"][ROUNDS] = number + 1


def _missing(barrier: ir.Value, parity: ir.Value) -> ir.Value:
    """Whether a barrier's phase of a parity is not over."""
    return arith.xori(nvvm.mbarrier_test_wait(barrier, parity), mu.c(1, ir.IntegerType.get_signless(1)))


def send_array(m: Machine, here: Ref, there: Ref, number: jax.Array, peer: Index) -> None:
    """A float32 array [n], of a multiple of 4, in shared memory, which no thread still writes, to a place like `there` in a peer's."""
    watched = _watched(m)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(), SCALAR, SCALAR, *(plgpu.RefType() for _ in watched)))
    def go(ctx: Context, exchange: Ref, here: Ref, there: Ref, which: Index, peer: Index, *watched: Ref) -> None:
        n, owner = ir.MemRefType(here.type).shape[0] // 4, peer.registers.item()
        source, to, barrier = _address(here), _remote(_address(there), owner), _remote(_address(exchange, _twice(which)), owner)
        thread = thread_idx()
        with _taking_part(watched):
            for first in range(0, n, THREADS):
                at = arith.addi(thread, constant(first))
                with mu.when(arith.cmpi(arith.CmpIPredicate.ult, at, constant(n))):
                    _send(_after(to, at, 16), _load(_after(source, at, 16)), barrier)

    go(m.refs["exchange"], here, there, lax.rem(number, 2), i32(peer), *watched)  # pyright: ignore[reportCallIssue]


def send_sums(
    m: Machine, phase: FoldPhase, plan: FoldPlan, sums: Sequence[jax.Array], s: Index, number: jax.Array, peer: jax.Array
) -> None:
    """Sums of the owner's s-th tile to its shared memory, in the order of `store_diagonal`."""
    rows, which, watched = m.refs[f"sums.{phase.name}"], buffer(m, phase, number, m.rank), _watched(m)
    there = rows.at[which, s] if m.batch >= 8 else rows.at[which, :, s]

    @plgpu.inline_mgpu(
        arg_types=(*(plgpu.RefType() for _ in watched), *(ACC for _ in sums), plgpu.RefType(), plgpu.RefType(), SCALAR, SCALAR)
    )
    def go(ctx: Context, *args: Any) -> None:
        watched, (*arrays, ref, exchange, which, peer) = args[: -4 - len(sums)], args[-4 - len(sums) :]
        owner = peer.registers.item()
        to, barrier = _remote(_address(ref), owner), _remote(_address(exchange, _twice(which)), owner)
        strides = ir.MemRefType(ref.type).get_strides_and_offset()[0]

        def put(value: ir.Value, at: Sequence[ir.Value]) -> None:
            place = to
            for index, stride in zip(at, strides, strict=True):
                place = _after(place, index, 4 * stride)
            _send(place, [arith.bitcast(ir.IntegerType.get_signless(32), value)], barrier)

        with _taking_part(watched):
            diagonal(arrays, put, split_k=plan.split_k, sequences=m.batch)

    go(*watched, *sums, there, m.refs["exchange"], lax.rem(number, 2), peer)  # pyright: ignore[reportCallIssue]


def _watched(m: Machine) -> tuple[Ref, ...]:
    """What says whether this worker still takes part, where it may cease to."""
    return () if m.deadline is None else (m.watched,)


@contextlib.contextmanager
def _taking_part(watched: Sequence[ir.Value]) -> Iterator[None]:
    """As long as this worker has given up no wait. A barrier whose round was given up is never complete: more arrivals would be an error."""
    if not watched:
        yield
        return
    out = gave_up(watched[0])
    with mu.when(arith.xori(out, mu.c(1, out.type))):
        yield


# Words, and addresses in shared memory, which are words too: 64-bit arithmetic would double the code.


def _send(to: ir.Value, words: Sequence[ir.Value], barrier: ir.Value) -> None:
    names = ", ".join(f"${1 + i}" for i in range(len(words)))
    data = (".v4", f"{{{names}}}") if len(words) == 4 else ("", names)
    ptx = f"st.async.shared::cluster.mbarrier::complete_tx::bytes{data[0]}.b32 [$0], {data[1]}, [${1 + len(words)}];"
    mu.inline_ptx(ptx, to, *words, barrier, has_side_effects=True)


def _load(source: ir.Value) -> list[ir.Value]:
    """Four words."""
    word = ir.IntegerType.get_signless(32)
    return list(mu.inline_ptx("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", source, result_types=[word] * 4, has_side_effects=True))


def _remote(address: ir.Value, peer: ir.Value) -> ir.Value:
    """The same place in a peer's shared memory."""
    return mu.inline_ptx(
        "mapa.shared::cluster.u32 $0, $1, $2;", address, peer, result_types=ir.IntegerType.get_signless(32), has_side_effects=True
    )


def _address(ref: ir.Value, word: ir.Value | None = None) -> ir.Value:
    start = llvm.ptrtoint(ir.IntegerType.get_signless(32), mu.memref_ptr(ref))
    return start if word is None else _after(start, word, 4)


def _after(address: ir.Value, index: ir.Value, size: int) -> ir.Value:
    """So many items of a size further on."""
    word = ir.IntegerType.get_signless(32)
    index = index if index.type == word else arith.index_castui(word, index)
    return arith.addi(address, arith.muli(index, constant(size)))


def _barrier(exchange: ir.Value, which: Index) -> ir.Value:
    """A pointer, as Mosaic's own functions want it."""
    return mu.getelementptr(mu.memref_ptr(exchange), [_twice(which)], ir.IntegerType.get_signless(32))


def _twice(which: Index) -> ir.Value:
    """Where a barrier's words are."""
    return arith.muli(which.registers.item(), constant(2))
