"""`assemble`: kernels through LLVM and ptxas, for a GPU that need not be there. Nothing is run."""

import contextlib
import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.mosaic.gpu import core, utils

from mkdsl.gpu._compiler import compile_module


@dataclasses.dataclass(frozen=True)
class Assembled:
    """What a GPU would load of one kernel.

    Attributes:
      registers: of a thread.
      stack_bytes: of a thread.
      spill_bytes: that a thread stores and loads because registers did not suffice.
      smem_bytes: shared memory that a launch asks for, of one CTA.
      code_bytes: machine code. Under load, Hopper's instruction caches hold about 112 KiB.
      ptx: the PTX.
      log: ptxas's report.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    smem_bytes: int
    code_bytes: int
    ptx: str = dataclasses.field(repr=False)
    log: str = dataclasses.field(repr=False)


def assemble(fn: Callable[..., Any], *avals: Any, capability: tuple[int, int] = (9, 0)) -> tuple[Assembled, ...]:
    """Compiles every Mosaic GPU kernel that a function calls, as JAX would on a GPU.

    Args:
      fn: JAX-traceable: a kernel, or a `Lowered.program`.
      avals: arrays or jax.ShapeDtypeStruct, its arguments (`Lowered.signature`).
      capability: compute capability of the GPU, such as (8, 9) for Ada; `Profile.capability`.

    Returns:
      A report of each different kernel, in the order in which they are called.

    Raises:
      ValueError: fn calls no kernel.
      RuntimeError: a kernel does not compile, or the compiler is not installed; says how to install it.
    """
    with lowering_for(capability) as kernels:
        jax.jit(lambda *args: fn(*args)).trace(*avals).lower(lowering_platforms=("cuda",))  # a function that JAX has not lowered yet
    if not kernels:
        raise ValueError(f"{fn} calls no Mosaic GPU kernel: nothing to assemble")
    return tuple(assemble_module(module, capability) for module in kernels.values())


@contextlib.contextmanager
def lowering_for(capability: tuple[int, int]) -> Iterator[dict[bytes, bytes]]:
    """While JAX lowers for a GPU that is not there: the modules that it makes, by their hashes. JAX has no public word for either."""
    modules: dict[bytes, bytes] = {}
    before = core.KNOWN_KERNELS, utils._infer_arch
    core.KNOWN_KERNELS, utils._infer_arch = modules, lambda: capability
    try:
        yield modules
    finally:
        core.KNOWN_KERNELS, utils._infer_arch = before


def assemble_module(module: bytes, capability: tuple[int, int]) -> Assembled:
    """One of the modules that `lowering_for` has collected; arguments, and what is raised, as for `assemble`."""
    with tempfile.TemporaryDirectory(prefix="mkdsl-") as folder:
        text, numbers = compile_module(module, capability, pathlib.Path(folder))
    ptx, *report = re.split(r"(?m)^(?=ptxas )", text, maxsplit=1)
    log = "".join(report)

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        if found is None:
            raise RuntimeError(f"ptxas's report has no {pattern!r}:\n{log}")
        return int(found[1])

    return Assembled(
        registers=number(r"Used (\d+) registers"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        spill_bytes=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        ptx=ptx,
        log=log,
        **numbers,
    )
