"""`Program`: a schedule lowered to kernels, as a function of the decode step's arguments."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mkdsl.graph import Node, OpGraph, given_value
from mkdsl.lower._kernel import make_kernel
from mkdsl.lower._machine import MOMENTS, i32, step_count
from mkdsl.lower._operands import Inputs, Operand, operands
from mkdsl.lower._types import Carry, Index
from mkdsl.lower._waits import GivenUp, given_up
from mkdsl.ops import Argmax
from mkdsl.proof import verify_schedule
from mkdsl.schedule import Profile, Schedule


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A decode step as kernels. Calling it is JAX-traceable: `program(params, kv, token, pos)`, with a leading batch axis on all but params.

    form: "mega" is one persistent kernel, "phased" one launch per phase from the same tile code.
    tma: the ring is filled by TMA, else by `cp.async`.
    deadline: seconds after which a kernel's workers no longer wait for each other; None for no such time.
    """

    graph: OpGraph
    schedule: Schedule
    form: str
    interpret: bool
    tma: bool
    tree: Any
    deadline: float | None = None

    def __call__(self, params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> Any:
        return self._call(self._operands(), params, kv, token, pos)[0]

    def _operands(self) -> list[Operand]:
        return operands(self.graph, self.schedule, watched=self.deadline is not None)

    def __repr__(self) -> str:
        return f"<Program in {self.form} form of {self.schedule!r}>"

    @property
    def operand_names(self) -> list[str]:
        """What the kernels are handed, in order."""
        return [o.name for o in self._operands()]

    def watched(self, params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> tuple[Any, jax.Array]:
        """The same of a program with a deadline. The second result is for `given_up`: if that finds a wait that was given up, the first means
        nothing."""
        outs, refs = self._call(self._operands(), params, kv, token, pos)
        return outs, refs["counters"][...]

    def given_up(self, counters: np.ndarray) -> list[GivenUp]:
        """The waits that workers gave up at the deadline, the least advanced first: what held up the others. counters: from `watched`."""
        return given_up(self.graph, self.schedule, counters)

    def timed(self, params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> tuple[Any, jax.Array]:
        """The same in a kernel that notes times. The second result is int32 [workers, steps, 5]: nanoseconds by the GPU's clock, low 32 bits,
        at which a worker's compute arrived at a step, knew that its input is there, had read it, had folded its (last) units, and had
        signalled. Steps are executions of phases in program order; those that a worker skips are zeros. Only on a GPU, in mega form.

        Raises:
          ValueError: of a program in another form, in which a launch is a phase and a profiler shows all there is to see.
        """
        if self.form != "mega":
            raise ValueError(f"a kernel notes times in mega form only, not in {self.form} form")
        found = self._operands()
        shape = self.schedule.workers, step_count(self.graph), len(MOMENTS)
        stamps = Operand("stamps", lambda _: jnp.zeros(math.prod(shape), i32), written=True)
        outs, refs = self._call([*found, stamps], params, kv, token, pos)
        return outs, refs["stamps"][...].reshape(shape)

    def _call(self, found: list[Operand], params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> tuple[Any, dict[str, Any]]:
        constants = map(jnp.asarray, self.graph.constants)
        inputs = Inputs([*jax.tree.leaves(params), *constants], jax.tree.leaves(kv), token, pos)
        refs = {o.name: jax.new_ref(o.build(inputs)) if o.written else o.build(inputs) for o in found}
        self._run(found, refs)
        outs = [self._output(self.graph.node(id), refs, inputs) for id in self.graph.outputs]
        return jax.tree.unflatten(self.tree, outs), refs

    def _run(self, found: list[Operand], refs: dict[str, Any]) -> None:
        args = [refs[o.name] for o in found]
        schedule = self.schedule if self.form == "mega" else self.schedule.phased()
        make = functools.partial(make_kernel, self.graph, schedule, found, interpret=self.interpret, tma=self.tma, deadline=self.deadline)
        if self.form == "mega":
            make(self.graph.phases, concurrent=True)(*args)
            return
        for segment in self.graph.segments:
            kernels = [make([self.graph.phase(name)], concurrent=False) for name in segment.phases]

            def once(iteration: Index, carry: Carry, kernels: list[Any] = kernels) -> Any:
                for kernel in kernels:
                    kernel(*args, jnp.reshape(jnp.asarray(iteration, i32), (1,)))
                return carry

            lax.fori_loop(0, segment.repeats, once, 0)

    def _output(self, node: Node, refs: dict[str, Any], inputs: Inputs) -> jax.Array:
        batch = self.schedule.batch
        if node.id in self.graph.output_of:
            return refs[self.graph.output_of[node.id]][0, :batch, : node.width].astype(node.dtype)
        if node.kind == "argmax":
            return jax.vmap(lambda x: Argmax().reference(x)[0])(self._output(self.graph.node(node.inputs[0]), refs, inputs))
        if node.kind == "append":
            leaf = self.graph.node(node.inputs[0]).op
            return refs[f"cache{leaf.index}"][...].reshape(inputs.kv[leaf.index].shape)
        if node.kind == "cache":
            return inputs.kv[node.op.index]
        if node.kind in ("token", "pos", "given"):
            return jax.vmap(lambda token, pos: given_value(self.graph, node.id, inputs.params, token, pos))(inputs.token, inputs.pos)
        if node.kind == "literal":
            return jnp.broadcast_to(jnp.asarray(node.op), (batch, *node.shape))
        if node.kind == "map":
            args = [self._output(self.graph.node(i), refs, inputs) for i in node.inputs]
            return jax.vmap(lambda *a: node.op[0].bind(*a, **node.op[1]))(*args)
        raise ValueError(f"{node.where}: output {node.kind}{list(node.shape)}")  # verify_graph lets no such output through


def lower(
    graph: OpGraph, schedule: Schedule, profile: Profile, tree: Any, *, interpret: bool = False, form: str | None = None, deadline: float | None = None,
) -> Program:  # fmt: skip
    """Verifies the schedule and returns its program.

    Args:
      graph: what to compute.
      schedule: how; verified first, always.
      profile: the hardware the schedule is for.
      tree: the structure of the decode step's outputs.
      interpret: run on the CPU under the race detector, in phased form.
      form: "mega" or "phased"; mega unless interpreting, whose relaxed hand-offs no interpreter knows.
      deadline: seconds after which workers that still wait for each other give up, and the kernel ends; None for no such time.

    Raises:
      ScheduleError: the schedule is not safe.
      ValueError: a deadline in phased form, in which nobody waits for anybody, or one that is shorter than the step is predicted to take.
    """
    verify_schedule(graph, schedule, profile)
    tma = profile.tma or interpret  # interpret mode knows no other copy
    form = form or ("phased" if interpret else "mega")
    if deadline is not None:
        _check_deadline(deadline, schedule, form)
    return Program(graph.in_order(schedule.order), schedule, form, interpret, tma, tree, deadline)


def _check_deadline(deadline: float, schedule: Schedule, form: str) -> None:
    if form != "mega":
        raise ValueError(f"{deadline=} in {form} form, in which each launch is a phase and no worker waits for another: leave it out")
    if 1e6 * deadline <= schedule.predicted_us:
        raise ValueError(
            f"{deadline=} seconds; the step itself is predicted to take {schedule.predicted_us:.0f} us: allow a second or more"
        )
