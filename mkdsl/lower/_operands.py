"""What a kernel is handed: weights where they are, the cache, small tables, and the tensors that cross phases."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mkdsl.graph import FoldPhase, Node, OpGraph, Tensor, given_value
from mkdsl.lower._machine import i32
from mkdsl.lower.mosaic._ptx import COUNTER_STRIDE
from mkdsl.schedule import SHARING, Schedule


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The decode step's arguments, flattened, with a batch axis."""

    params: Sequence[jax.Array]
    kv: Sequence[jax.Array]
    token: jax.Array
    pos: jax.Array


@dataclasses.dataclass(frozen=True)
class Operand:
    """One argument of the kernel. `written`: it is a reference that the kernel writes to."""

    name: str
    build: Callable[[Inputs], jax.Array]
    written: bool = False


def operands(graph: OpGraph, schedule: Schedule) -> list[Operand]:
    """All operands of a graph's kernels under a schedule, by name."""
    made = (*_given(graph, schedule), *_weights(graph, schedule), *_small(graph), *_caches(graph), *_tensors(graph, schedule))
    found = {o.name: o for o in made}
    table = task_table(graph, schedule)
    found["table"] = Operand("table", lambda _: jnp.asarray(table))
    n = len(graph.phases) * COUNTER_STRIDE
    found["counters"] = Operand("counters", lambda _: jnp.full((n,), -1, i32), written=True)
    return list(found.values())


def task_table(graph: OpGraph, schedule: Schedule) -> np.ndarray:
    """[workers, columns] int32: per worker (first item, count) of every part of every phase, padded to whole 128-word rows."""
    parts = [part for phase in graph.phases for part in schedule.plan(phase.name).tasks]
    table = np.zeros((schedule.workers, -(-2 * len(parts) // 128) * 128), np.int32)
    for i, part in enumerate(parts):
        table[:, 2 * i : 2 * i + 2] = part
    return table


def _given(graph: OpGraph, schedule: Schedule) -> list[Operand]:
    """What is known of each sequence before the kernel starts, [batch]: token, position, numbers computed from them. Sequences that pad the
    batch have zeros. Rotations [batch, 2, head_dim / 2]; or of every position, where these are few and need no kernel of XLA's."""
    pad = schedule.padded_batch - schedule.batch

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x.astype(i32) if x.dtype == bool else x, ((0, pad), *((0, 0),) * (x.ndim - 1)))

    def given(id: int, a: Inputs) -> jax.Array:
        return jax.vmap(lambda token, pos: given_value(graph, id, a.params, token, pos))(a.token, a.pos)

    def rotations(node: Node, a: Inputs) -> jax.Array:
        return jax.vmap(lambda pos: node.op.rotation(pos, node.shape[1]))(given(node.inputs[1], a))

    out = [Operand("token", lambda a: padded(a.token.astype(i32))), Operand("pos", lambda a: padded(a.pos.astype(i32)))]
    for node in map(graph.node, graph.dag):
        if node.kind == "given" and node.is_scalar:
            out.append(Operand(f"given{node.id}", lambda a, id=node.id: padded(given(id, a).reshape(-1))))
        if node.kind == "rope" and graph.has_table(node):
            table = node.op.table(graph.table_length, node.shape[1])
            out.append(Operand(f"rope{node.id}", lambda _, t=table: jnp.asarray(t)))
        elif node.kind == "rope":
            out.append(Operand(f"rope{node.id}", lambda a, node=node: padded(rotations(node, a))))
    return out


def _weights(graph: OpGraph, schedule: Schedule) -> list[Operand]:
    """Each streamed weight as [layers * rows, split_k, k / split_k]: pieces of one row apart, so that one copy fetches a tile. A free reshape."""
    out = []
    for phase in (p for p in graph.phases if isinstance(p, FoldPhase)):
        split_k = schedule.plan(phase.name).split_k
        for fold in (f for folds, _ in graph.code[phase.name].parts for f in folds):
            leaf = graph.node(graph.node(fold).inputs[0]).op
            shape = (-1, phase.k) if split_k == 1 else (-1, split_k, phase.k // split_k)
            out.append(Operand(f"weight{fold}", lambda a, i=leaf.index, s=shape: a.params[i].reshape(s)))
    return out


def _small(graph: OpGraph) -> list[Operand]:
    """Norm weights and biases as [layers, features], numbers as [layers], embedding tables as they are."""
    out = []
    for node in (n for n in map(graph.node, graph.dag) if n.kind == "param"):
        users = [graph.node(u) for u in graph.dag.successors(node.id)]
        if all(u.kind == "given" or (u.kind == "fold" and u.inputs[0] == node.id) for u in users):
            continue
        table = any(u.kind == "embed" for u in users)
        shape = (-1,) if node.is_scalar else (-1, node.width)
        out.append(Operand(f"param{node.op.index}", lambda a, i=node.op.index, s=None if table else shape: _shaped(a.params[i], s)))
    return out


def _shaped(array: jax.Array, shape: tuple[int, ...] | None) -> jax.Array:
    array = array.astype(i32) if array.dtype == bool else array
    return array if shape is None else array.reshape(shape)


def _caches(graph: OpGraph) -> list[Operand]:
    """Each cache leaf as [batch, layers, kv_heads, context, head_dim]."""
    leaves = {node.op.index: node.op for node in (graph.node(i) for i in graph.dag) if node.kind == "cache"}
    stacked = {graph.node(i).op.index for i in graph.dag if graph.node(i).kind == "cache" and graph.node(i).op.stacked}
    return [Operand(f"cache{i}", lambda a, i=i: a.kv[i] if i in stacked else a.kv[i][:, None], written=True) for i in leaves]


def _tensors(graph: OpGraph, schedule: Schedule) -> list[Operand]:
    out = []
    for tensor in graph.tensors.values():
        out.append(
            Operand(
                tensor.name, lambda _, t=tensor: _empty(schedule, t, tensor_shape(schedule, t), schedule.tensor(t.name).dtype), written=True
            )
        )
        if tensor.heads and schedule.tensor(tensor.name).splits > 1:
            shape = (*tensor_shape(schedule, tensor)[:3], tensor.width // SHARING)
            out.append(Operand(f"{tensor.name}.lse", lambda _, t=tensor, s=shape: _empty(schedule, t, s, "float32"), written=True))
    return out


def tensor_shape(schedule: Schedule, tensor: Tensor) -> tuple[int, ...]:
    """[incarnations, batch, width]; attention's result as [incarnations, splits, batch, heads, head_dim]."""
    if tensor.output:
        return 1, schedule.padded_batch, tensor.width
    plan = schedule.tensor(tensor.name)
    if tensor.heads:
        return plan.incarnations, plan.splits, schedule.padded_batch, tensor.heads, tensor.width // tensor.heads
    return plan.incarnations, schedule.padded_batch, tensor.width


def _empty(schedule: Schedule, tensor: Tensor, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Nothing yet: the sentinel in every word, and zeros for the sequences that only pad the batch."""
    if tensor.output:
        return lax.empty(shape, jnp.float32)
    word = {"bfloat16": jnp.uint16, "float32": jnp.uint32}[dtype]
    ones = lax.bitcast_convert_type(jnp.full(shape, jnp.iinfo(word).max, word), dtype)
    if schedule.batch == schedule.padded_batch:
        return ones
    axis = 2 if tensor.heads else 1
    real = lax.broadcasted_iota(i32, shape, axis) < schedule.batch
    return jnp.where(real, ones, jnp.zeros(shape, dtype))
