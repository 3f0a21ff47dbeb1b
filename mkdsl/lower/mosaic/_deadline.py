"""Loops that look until something is there, and in a kernel with a deadline give up once it has passed.

The deadline is one moment for all waits of a worker: after it no wait takes longer than a look, and the kernel runs to its end, whatever it then
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

        The clock is read at every look, in the shadow of its loads. Were it read only where something is missing, the compiler would have the
        first look apart, and all its code twice.
        """
        if self._watch is None:
            return _while(types, look)
        words, number = watch
        flag, word, detail = ir.IntegerType.get_signless(1), ir.IntegerType.get_signless(32), self._watch.detail

        def look_in_time() -> tuple[ir.Value, list[ir.Value]]:
            missing, seen = look()
            return arith.andi(missing, arith.xori(passed(words), mu.c(1, flag))), [*seen, missing]

        *seen, missing = _while([*types, flag], look_in_time)
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


def _note(words: ir.Value, number: Any, detail: ir.Value) -> None:
    """Notes a wait, if none has been noted."""
    swap = "{ .reg .b64 t; mov.b64 t, {$1, $2}; atom.shared.cas.b64 t, [$0+8], -1, t; }"
    mu.inline_ptx(swap, _address(words), number.registers.item(), detail, has_side_effects=True)


def _address(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), mu.memref_ptr(ref))
