"""What a kernel is handed: weights where they are, the cache, small tables, and the tensors that cross phases."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mkdsl.graph import AttentionPhase, FoldPhase, Leaf, Node, OpGraph, Tensor, given_value
from mkdsl.lower._machine import i32
from mkdsl.lower._tile import Tile
from mkdsl.lower._waits import first_note
from mkdsl.lower.mosaic._deadline import NOTE, WORDS
from mkdsl.schedule import SHARING, FoldPlan, Schedule


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


def operands(graph: OpGraph, schedule: Schedule, *, watched: bool = False) -> list[Operand]:
    """All operands of a graph's kernels under a schedule, by name. watched: with room for what the workers note at a deadline."""
    made = (*_given(graph, schedule), *_weights(graph, schedule), *_small(graph), *_caches(graph), *_tensors(graph, schedule))
    found = {o.name: o for o in made}
    table = task_table(graph, schedule, watched=watched)
    found["table"] = Operand("table", lambda _: jnp.asarray(table))
    n = first_note(graph) + NOTE * schedule.workers * watched
    found["counters"] = Operand("counters", lambda _: jnp.full((n,), -1, i32), written=True)
    return list(found.values())


def task_table(graph: OpGraph, schedule: Schedule, *, watched: bool = False) -> np.ndarray:
    """[workers, columns] int32: per worker (first item, count) of every part of every phase, padded to whole 128-word rows. watched: with
    words to spare at a row's end, where its worker keeps its deadline."""
    parts = [part for phase in graph.phases for part in schedule.plan(phase.name).tasks]
    table = np.zeros((schedule.workers, -(-(2 * len(parts) + WORDS * watched) // 128) * 128), np.int32)
    for i, part in enumerate(parts):
        table[:, 2 * i : 2 * i + 2] = part
    return table


def _given(graph: OpGraph, schedule: Schedule) -> list[Operand]:
    """What is known of each sequence before the kernel starts, [batch]: token, position, numbers computed from them. Sequences that pad the
    batch have zeros. Rotations (`Rope.rotation`) [batch, 2, ..]; or of every position, where these are few and need no kernel of XLA's."""
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
    """Each streamed weight as [layers * rows, split_k, k / split_k]: pieces of one row apart, so that one copy fetches a tile. A free reshape
    of all but those that no copy engine takes as they are."""
    out = []
    for phase in (p for p in graph.phases if isinstance(p, FoldPhase)):
        plan = schedule.plan(phase.name)
        assert isinstance(plan, FoldPlan)
        tile = Tile.of(phase, plan, schedule.padded_batch)
        shape = (-1, tile.k) if tile.split_k == 1 else (-1, tile.split_k, tile.k // tile.split_k)
        for fold in (f for folds, _ in graph.code[phase.name].parts for f in folds):
            weight = graph.node(graph.node(fold).inputs[0])

            def build(a: Inputs, weight: Node = weight, tile: Tile = tile, shape: tuple[int, ...] = shape) -> jax.Array:
                array = a.params[weight.op.index] if tile.handed(weight) == weight.rows else weight.op.of(a.params)
                return _in_multiples(array, tile.block_rows, tile.k).reshape(shape)

            out.append(Operand(f"weight{fold}", build))
    return out


def _in_multiples(x: jax.Array, *of: int) -> jax.Array:
    """With zeros behind its last axes, up to multiples of these sizes; itself where it has them, which is nearly always."""
    more = [-n % m for n, m in zip(x.shape[-len(of) :], of, strict=True)]
    return jnp.pad(x, [(0, 0)] * (x.ndim - len(of)) + [(0, n) for n in more]) if any(more) else x


def _small(graph: OpGraph) -> list[Operand]:
    """Norm weights and biases as [layers, features], numbers as [layers], embedding tables as they are; features in whole tiles."""
    out = []
    for node in (n for n in map(graph.node, graph.dag) if n.kind == "param"):
        users = [graph.node(u) for u in graph.dag.successors(node.id)]
        if all(u.kind == "given" or (u.kind == "fold" and u.inputs[0] == node.id) for u in users):
            continue
        table = any(u.kind == "embed" for u in users)
        shape = (-1,) if node.is_scalar else (-1, node.width)
        width = 1 if node.is_scalar else graph.tiled(node.shape[-1] if table else node.width)

        def build(
            a: Inputs, leaf: Leaf = node.op, shape: tuple[int, ...] | None = None if table else shape, width: int = width
        ) -> jax.Array:
            return _in_multiples(_shaped(leaf.of(a.params), shape), width)

        out.append(Operand(node.op.parameter, build))
    return out


def _shaped(array: jax.Array, shape: tuple[int, ...] | None) -> jax.Array:
    array = array.astype(i32) if array.dtype == bool else array
    return array if shape is None else array.reshape(shape)


def _caches(graph: OpGraph) -> list[Operand]:
    """Each cache leaf as [batch, layers, kv_heads, context, head_dim], or of a paged one [layers, pages, kv_heads, size, head_dim] and the table
    [batch, width]."""
    nodes = [graph.node(i) for i in graph.dag]
    stacked = {n.op.index for n in nodes if n.kind == "cache" and n.op.stacked}
    pages = {graph.node(n.inputs[0]).op.index for n in nodes if n.kind == "append" and len(n.inputs) > 3}
    tables = {graph.node(n.inputs[3]).op.index for n in nodes if n.kind == "append" and len(n.inputs) > 3}

    def build(a: Inputs, i: int) -> jax.Array:
        layers = 0 if i in pages else 1
        return a.kv[i] if i in stacked or i in tables else jnp.expand_dims(a.kv[i], layers)

    leaves = dict.fromkeys(n.op.index for n in nodes if n.kind == "cache")
    return [Operand(f"cache{i}", functools.partial(build, i=i), written=i not in tables) for i in leaves]


def _tensors(graph: OpGraph, schedule: Schedule) -> list[Operand]:
    out = []
    for tensor in graph.tensors.values():
        shape, real = tensor_shape(schedule, tensor), _written(graph, schedule, tensor)
        if tensor.output:
            out.append(Operand(tensor.name, lambda _, s=shape: lax.empty(s, jnp.float32), written=True))
            continue
        dtype = schedule.tensor(tensor.name).dtype
        out.append(Operand(tensor.name, lambda _, s=shape, r=real, d=dtype: _empty(s, r, d), written=True))
        if tensor.heads and schedule.tensor(tensor.name).splits > 1:
            lse = (*shape[:3], tensor.width // SHARING)
            real = {axis: n * shape[-1] // SHARING if axis == 3 else n for axis, n in real.items()}
            out.append(Operand(f"{tensor.name}.lse", lambda _, s=lse, r=real: _empty(s, r, "float32"), written=True))
    return out


def _written(graph: OpGraph, schedule: Schedule, tensor: Tensor) -> dict[int, int]:
    """By axis, how much of a tensor is ever written: not the sequences that only pad the batch, nor heads that only fill the last tile."""
    real = {2 if tensor.heads else 1: schedule.batch}
    writers = [p for p in graph.writers[tensor.name] if isinstance(p, AttentionPhase)]
    return real | {3: writers[0].heads} if writers else real


def tensor_shape(schedule: Schedule, tensor: Tensor) -> tuple[int, ...]:
    """[incarnations, batch, width]; attention's result as [incarnations, splits, batch, heads, head_dim], heads that fill the last tile included."""
    if tensor.output:
        return 1, schedule.padded_batch, tensor.width
    plan = schedule.tensor(tensor.name)
    if tensor.heads:
        return plan.incarnations, plan.splits, schedule.padded_batch, tensor.heads, tensor.width // tensor.heads
    return plan.incarnations, schedule.padded_batch, tensor.width


def _empty(shape: tuple[int, ...], real: dict[int, int], dtype: str) -> jax.Array:
    """Nothing yet: the sentinel in every word that will be written, and zeros in all others."""
    word = {"bfloat16": jnp.uint16, "float32": jnp.uint32}[dtype]
    out = lax.bitcast_convert_type(jnp.full(shape, jnp.iinfo(word).max, word), dtype)
    for axis, size in real.items():
        if size < shape[axis]:
            out = jnp.where(lax.broadcasted_iota(i32, shape, axis) < size, out, jnp.zeros(shape, dtype))
    return out
