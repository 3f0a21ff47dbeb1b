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
from mkdsl.engine._decoder import batched_shapes, kernel_step, shapes
from mkdsl.engine._engine import PIECE, backend_sizes, whole_pages
from mkdsl.gpu import Assembled, Kept, assemble, assemble_module, here, identity, keep_executables
from mkdsl.graph import build_graph
from mkdsl.models import DecoderConfig, abstract_params, decode_step
from mkdsl.schedule import Profile
from mkdsl.search import directory, floor_us, read, search, write

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
    step = kernel_step(order.config, whole_pages(order.context), batch, target=order.target)
    there = exported(_paper(order, {batch: step}).calls([batch], 0))
    kernel, unassembled, known = _assembled(order, step, batch)
    graph = build_graph(decode_step(order.config), *shapes(order.config, whole_pages(order.context)))[0]
    schedule = search(graph, batch=batch, target=order.target)
    return Built(
        batch=batch,
        predicted_us=schedule.predicted_us,
        floor_us=floor_us(graph, batch, order.target),
        kernel=kernel,
        unassembled=unassembled,
        seconds=time.perf_counter() - start,
        there=there and known,
    )


def build_prefill(order: Order) -> bool:
    """The pieces of prompts. Returns whether they were there already."""
    return exported(_paper(order, {}).calls([], PIECE))


def exported(calls: Iterable[Call]) -> bool:
    """Keeps them all; whether they were there already."""
    return not [call for call in calls if not call.export("cuda")]


def compile_here(order: Order, free: int | None) -> None:
    """Has XLA compile all of it for the GPU at hand, which has so many bytes free."""
    keep_executables()
    steps = {batch: kernel_step(order.config, whole_pages(order.context), batch, target=order.target) for batch in order.batches}
    side_by_side(Call.compile, _paper(order, steps, free=free).calls(order.batches, PIECE))


def _paper(order: Order, steps: dict[int, Kept], free: int | None = None) -> OnPaper:
    params = abstract_params(order.config)
    weights = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params))
    free = None if free is None else free - weights
    sizes = backend_sizes(order.config, context=order.context, max_batch=max(order.batches), free=free, host=False)
    return OnPaper(order.config, params, step_of=steps.__getitem__, **sizes)


def _assembled(order: Order, step: Kept, batch: int) -> tuple[dict[str, int] | None, str, bool]:
    """The kernel's numbers, or why there are none; and whether they were there already."""
    path = directory("assembled") / f"{identity(step.content)}.json"
    if content := read(path):
        return json.loads(content), "", True
    try:
        found = _assemble(order, step, batch)
    except RuntimeError as error:
        if not str(error).startswith(MISSING):
            raise
        return None, str(error), True
    numbers = {name: getattr(found, name) for name in ("registers", "spill_bytes", "code_bytes")}
    write(path, json.dumps(numbers).encode())
    return numbers, "", False


def _assemble(order: Order, step: Kept, batch: int) -> Assembled:
    """The kernel that has just been emitted; or, where that is kept from before, it is emitted once more."""
    capability = order.target.capability
    if step.emitted:
        return assemble_module(step.emitted[0], capability)
    return assemble(step.f, *batched_shapes(order.config, whole_pages(order.context), batch), capability=capability)[0]


def _on_cpu() -> None:
    jax.config.update("jax_platforms", "cpu")
