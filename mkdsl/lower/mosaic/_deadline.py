"""Loops that look until something is there, and in a kernel with a deadline give up once it has passed.

The deadline is one moment for all waits of a worker: after it no wait takes longer than a few looks, and the kernel runs to its end, whatever it then
computes. The first wait that was given up is noted, and published at the end.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils as mu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from mkdsl.lower._types import Context, Ref

WORDS = 4  # int32 in shared memory: the moment in 64 bits, nanoseconds of the GPU's clock; the note in 64 bits, a number and a detail
NOTE = 2  # words of a note; all bits are set as long as no wait was given up
LOOKS = 16  # of which one goes with a look at the clock

type Look = Callable[[], tuple[ir.Value, list[ir.Value]]]  # (an i1, whether something is missing; what was seen)


class Watch(NamedTuple):
    """What a wait with a deadline needs.

    words: shared memory, int32 [WORDS]. number: int32 [], says which wait it is. detail: noted beside; None for what the wait has seen.
    """

    words: Ref
    number: Any
    detail: int | None = None


class Poll:
    """A loop being emitted that looks until something is there, with a deadline or without. `types` and `values` go to `plgpu.inline_mgpu` as its
    last arguments, which come back as the last ones of `until_there`."""

    def __init__(self, watch: Watch | None) -> None:
        self._watch = watch
        self.types = () if watch is None else (plgpu.RefType(), plgpu.Layout.WG_SPLAT(()))
        self.values = () if watch is None else (watch.words, watch.number)

    def until_there(self, types: Sequence[ir.Type], look: Look, *watch: Any) -> list[ir.Value]:
        """Looks until nothing is missing or the deadline has passed; returns what was seen last, of these types. One copy of the code.

        The clock is read before every LOOKS-th look, in the shadow of its loads: so what is there at once or soon is seen no later.
        """
        if self._watch is None:
            return _while(types, look)
        words, number = watch
        word, detail = ir.IntegerType.get_signless(32), self._watch.detail
        loop = scf.WhileOp([*types, ir.IntegerType.get_signless(1), word], [_looks()])
        before = loop.before.blocks.append(word)
        with ir.InsertionPoint.at_block_begin(before):
            left = _looks_left(before.arguments[0], words)
            missing, seen = look()
            go_on = arith.andi(missing, arith.cmpi(arith.CmpIPredicate.ne, left, mu.c(0, word)))
            scf.condition(go_on, [*seen, missing, left])
        after = loop.after.blocks.append(*(r.type for r in loop.results))
        with ir.InsertionPoint.at_block_begin(after):
            scf.yield_([after.arguments[-1]])
        *seen, missing, _ = loop.results
        with mu.when(missing):
            _note(words, number, seen[0] if detail is None else mu.c(detail, word))
        return seen


def _while(types: Sequence[ir.Type], look: Look) -> list[ir.Value]:
    loop = scf.WhileOp(types, [])
    with ir.InsertionPoint.at_block_begin(loop.before.blocks.append()):
        scf.condition(*look())
    with ir.InsertionPoint.at_block_begin(loop.after.blocks.append(*types)):
        scf.yield_([])
    return list(loop.results)


def _looks() -> ir.Value:
    """How many looks there are until the clock is read, hidden from the compiler: knowing it, it would write out the first look apart."""
    word = ir.IntegerType.get_signless(32)
    return mu.inline_ptx("mov.b32 $0, $1;", mu.c(LOOKS, word), result_types=word, has_side_effects=True)


def _looks_left(left: ir.Value, words: ir.Value) -> ir.Value:
    """Before one more look; 0 if the clock was read and the deadline has passed."""
    word = left.type
    left = arith.subi(left, mu.c(1, word))
    clock = scf.IfOp(arith.cmpi(arith.CmpIPredicate.eq, left, mu.c(0, word)), [word], has_else=True)
    read, wait = (region.blocks[0] for region in clock.regions)
    with ir.InsertionPoint.at_block_begin(read):
        scf.yield_([arith.select(passed(words), mu.c(0, word), mu.c(LOOKS, word))])
    with ir.InsertionPoint.at_block_begin(wait):
        scf.yield_([left])
    return clock.results[0]


def start_clock(words: Ref, nanoseconds: int) -> None:
    """The deadline of this worker: so long from now. For all threads of the warpgroup whose waits have it."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def go(ctx: Context, ref: Ref) -> None:
        with mu.single_thread(scope=mu.ThreadSubset.WARPGROUP):
            begin = f"mov.u64 t, %globaltimer; add.u64 t, t, {nanoseconds}; st.shared.u64 [$0], t; st.shared.u64 [$0+8], -1;"
            mu.inline_ptx(f"{{ .reg .u64 t; {begin} }}", _address(ref), has_side_effects=True)
        mu.warpgroup_barrier()

    go(words)  # pyright: ignore[reportCallIssue]


def publish(words: Ref, there: Ref) -> None:
    """Writes the note to global memory, int32 [NOTE], once all threads of the warpgroup are here."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def go(ctx: Context, ref: Ref, there: Ref) -> None:
        mu.warpgroup_barrier()
        with mu.single_thread(scope=mu.ThreadSubset.WARPGROUP):
            copy = "{ .reg .u64 t; ld.shared.u64 t, [$0+8]; st.global.u64 [$1], t; }"
            mu.inline_ptx(copy, _address(ref), mu.memref_ptr(there), has_side_effects=True)

    go(words, there)  # pyright: ignore[reportCallIssue]


def passed(words: ir.Value) -> ir.Value:
    """Whether the deadline has passed, an i1."""
    compare = "ld.shared.u64 t, [$1]; mov.u64 u, %globaltimer; setp.gt.u64 p, u, t; selp.b32 $0, 1, 0, p;"
    word = ir.IntegerType.get_signless(32)
    found = mu.inline_ptx(f"{{ .reg .u64 t, u; .reg .pred p; {compare} }}", _address(words), result_types=word, has_side_effects=True)
    return arith.cmpi(arith.CmpIPredicate.ne, found, mu.c(0, word))


def gave_up(words: ir.Value) -> ir.Value:
    """Whether a wait has been given up, an i1."""
    word = ir.IntegerType.get_signless(32)
    noted = mu.inline_ptx("ld.shared.b32 $0, [$1+8];", _address(words), result_types=word, has_side_effects=True)
    return arith.cmpi(arith.CmpIPredicate.ne, noted, mu.c(-1, word))


def _note(words: ir.Value, number: Any, detail: ir.Value) -> None:
    """Notes a wait, if none has been noted."""
    swap = "{ .reg .b64 t; mov.b64 t, {$1, $2}; atom.shared.cas.b64 t, [$0+8], -1, t; }"
    mu.inline_ptx(swap, _address(words), number.registers.item(), detail, has_side_effects=True)


def _address(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), mu.memref_ptr(ref))
