"""What a worker of the kernel computes of its events, beside what the proof takes it to signal and wait for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mkdsl.gpu import jit
from mkdsl.lower._machine import Machine
from mkdsl.lower._operands import task_table
from mkdsl.lower._signals import awaits, signals
from mkdsl.models import SHAPES, abstract_params, decode_step, init_cache
from mkdsl.search._groups import awaited, signalled

QKV = "wq+wk+wv"


def machine(batch: int) -> Machine:
    """Of SmolLM2 with an event for each of 3 kv heads, of q, k and v."""
    config, integers = SHAPES["smollm2-135m"], jax.ShapeDtypeStruct((batch,), jnp.int32)
    kv = jax.eval_shape(lambda: init_cache(config, 1024, batch=batch))
    traced = jit(decode_step(config), batch=batch, target="h200").trace(abstract_params(config), kv, integers, integers)
    schedule = traced.schedule()
    phases = tuple(dataclasses.replace(p, events=3) if p.name == QKV else p for p in schedule.phases)
    return Machine(traced.graph, dataclasses.replace(schedule, phases=phases), interpret=False, concurrent=True, tma=True)


def by_worker(m: Machine, spans) -> np.ndarray:
    """[worker, event]: those in any of the spans, (first, how many more), that a worker of the kernel computes."""
    table, cluster = task_table(m.graph, m.schedule), m.schedule.cluster

    def worker(tasks: jax.Array, rank: jax.Array) -> jax.Array:
        m.refs["tasks"] = tasks[None]
        return jnp.asarray(spans())

    each = jax.vmap(jax.vmap(worker, (None, 0), axis_name="cta"), (0, None))
    found = each(table.reshape(-1, cluster, table.shape[1]), jnp.arange(cluster))
    first, more = np.moveaxis(np.asarray(found).reshape(m.schedule.workers, -1, 1, 2), -1, 0)
    return ((np.arange(3) + 3 - first) % 3 <= more).any(axis=1)


@pytest.mark.parametrize("batch", [1, 8])
def test_workers_signal_and_wait_for_what_is_proven(batch):
    m = machine(batch)
    graph, plan = m.graph, m.schedule.plan(QKV)
    attention, qkv, wo = (graph.phase(n) for n in ("attention", QKV, "wo"))
    wanted, given = awaited(graph, m.schedule, attention, qkv), signalled(qkv, plan)
    assert not given.all() and not wanted.all()
    assert (by_worker(m, lambda: awaits(m, attention, qkv)) == wanted).all()
    assert (by_worker(m, lambda: signals(m, qkv)) == given).all()
    assert by_worker(m, lambda: awaits(m, wo, qkv)).all()
