"""All that a model needs on a GPU, made ahead and kept on disk: schedules, kernels and what calls them. No GPU is needed, only its profile.

Each batch is built in a process of its own, on the CPU: emitting a kernel is Python's work. What XLA makes of it for the GPU is added where there is one.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from mkdsl.engine._ahead import Call, side_by_side
from mkdsl.engine._backend import Backend
from mkdsl.engine._decoder import Pool, kernel_step, paged_shapes, require_kernel
from mkdsl.engine._engine import backend_options, pieces_of, pool_of
from mkdsl.gpu import Assembled, Kept, assemble, assemble_module, here, identity, jit, keep_executables
from mkdsl.models import DecoderConfig, abstract_params, decode_step
from mkdsl.schedule import Profile
from mkdsl.search import directory, floor_us, read, write

MISSING = "assembling without a GPU needs"  # how the message begins where the compiler is not installed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What to build. context: positions of a sequence, as the engine is given it; batches: all that the engine will decode."""

    config: DecoderConfig
    target: Profile
    context: int
    batches: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """One batch.

    Attributes:
      batch: sequences decoded together.
      predicted_us: of a decode step, by the simulator.
      floor_us: what device memory needs for it.
      kernel: registers, spill_bytes and code_bytes of the kernel; None where nothing is installed to assemble it with.
      unassembled: why it is None.
      seconds: it took.
      there: whether all of it was there already.
    """

    batch: int
    predicted_us: float
    floor_us: float
    kernel: dict[str, int] | None
    unassembled: str
    seconds: float
    there: bool


class OnPaper(Backend):
    """A backend of shapes: its calls can be exported and compiled, not made."""

    def reset(self) -> None:
        self._pages, self._slots = self._placed(jax.eval_shape(lambda: (self._empty_pages(), self._empty_slots())))

    def _placed(self, tree: Any) -> Any:
        """As `committed` arrays are, so that their calls find what is compiled for these."""
        where = here()
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), tree)


def build(order: Order) -> Iterator[Built]:
    """Builds all batches, side by side. As `mkdsl.engine.Engine` will ask for it with max_batch the largest of them.

    Raises:
      UnsupportedError, ScheduleError: a kernel does not take the model or the context.
    """
    if len(order.batches) == 1:
        yield build_batch(order, order.batches[0])
        return
    workers = min(os.cpu_count() or 1, len(order.batches))
    context = multiprocessing.get_context("spawn")  # a fork of a process with JAX's threads hangs
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_on_cpu) as processes:
        yield from processes.map(build_batch, [order] * len(order.batches), order.batches)


def build_batch(order: Order, batch: int) -> Built:
    """One batch: its schedule, its kernel, and the executable around that."""
    start = time.perf_counter()
    pool = pool_of(_options(order))
    require_kernel(order.config, pool, order.target)
    step = kernel_step(order.config, pool, batch, target=order.target)
    there = exported(_paper(order, {batch: step}).calls([batch], 0))
    kernel, unassembled, known = _assembled(order, pool, step, batch)
    traced = jit(decode_step(order.config), batch=batch, target=order.target).trace(*paged_shapes(order.config, pool, batch))
    schedule = traced.schedule()
    return Built(
        batch=batch,
        predicted_us=schedule.predicted_us,
        floor_us=floor_us(traced.graph, batch, order.target),
        kernel=kernel,
        unassembled=unassembled,
        seconds=time.perf_counter() - start,
        there=there and known,
    )


def exported(calls: Iterable[Call]) -> bool:
    """Keeps them all; whether they were there already."""
    return not [call for call in calls if not call.export("cuda")]


def compile_here(order: Order, free: int | None) -> None:
    """Has XLA compile all of it for the GPU at hand, which has so many bytes free; and the pieces of prompts, which cuDNN must be there for."""
    keep_executables()
    weights = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(abstract_params(order.config)))
    options = _options(order, None if free is None else free - weights)
    steps = {batch: kernel_step(order.config, pool_of(options), batch, target=order.target) for batch in order.batches}
    paper = OnPaper(order.config, abstract_params(order.config), step_of=steps.__getitem__, **options)
    side_by_side(Call.compile, paper.calls(order.batches, pieces_of(order.config, order.target).alone))


def _options(order: Order, free: int | None = None) -> dict[str, Any]:
    pieces = pieces_of(order.config, order.target)
    return backend_options(order.config, pieces, context=order.context, max_batch=max(order.batches), free=free, gpu=order.target)


def _paper(order: Order, steps: dict[int, Kept]) -> OnPaper:
    return OnPaper(order.config, abstract_params(order.config), step_of=steps.__getitem__, **_options(order))


def _assembled(order: Order, pool: Pool, step: Kept, batch: int) -> tuple[dict[str, int] | None, str, bool]:
    """The kernel's numbers, or why there are none; and whether they were there already."""
    path = directory("assembled") / f"{identity(step.content)}.json"
    if content := read(path):
        return json.loads(content), "", True
    try:
        found = _assemble(order, pool, step, batch)
    except RuntimeError as error:
        if not str(error).startswith(MISSING):
            raise
        return None, str(error), True
    numbers = {name: getattr(found, name) for name in ("registers", "spill_bytes", "code_bytes")}
    write(path, json.dumps(numbers).encode())
    return numbers, "", False


def _assemble(order: Order, pool: Pool, step: Kept, batch: int) -> Assembled:
    """The kernel that has just been emitted; or, where that is kept from before, it is emitted once more."""
    capability = order.target.capability
    if step.emitted:
        return assemble_module(step.emitted[0], capability)
    return assemble(step.f, *paged_shapes(order.config, pool, batch), capability=capability)[0]


def _on_cpu() -> None:
    jax.config.update("jax_platforms", "cpu")
