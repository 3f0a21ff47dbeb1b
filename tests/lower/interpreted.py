"""Runs interpreted kernels, as a user would and with schedules that a test asks for, and compares them with the float32 reference."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny_decoders import Decoder

import mkdsl as mk
from mkdsl.gpu import Traced
from mkdsl.graph import OpGraph
from mkdsl.schedule import Handoff, Profile, Schedule, profile
from mkdsl.search import draft, rings, timed, with_handoffs
from mkdsl.search._candidates import padded
from mkdsl.search._cost import Model
from mkdsl.search._draft import with_memory
from mkdsl.search._path import shortest_path
from mkdsl.search._rings import Choice, Prices, numbered

SMALL = dataclasses.replace(profile("H200"), name="h200 with 4 SMs", workers=4)
CONTEXT = 128
# At a block's ends and the cache's, in a block's middle, and where nothing is cached yet.
POSITIONS = (70, 127, 0, 64, 1, 63, 126, 7, 65, 9, 10, 11, 90, 100, 3, 5)
TOLERANCE = 0.02  # relative L2 of the logits: bfloat16 has 8 bits of mantissa


def arguments(decoder: Decoder, batch: int, context: int = CONTEXT) -> tuple[Any, ...]:
    """(params, kv, token, pos), a sequence at each of the first positions."""
    tokens, positions = np.arange(batch, dtype=np.int32) + 3, np.asarray(POSITIONS[:batch], np.int32) * (context // CONTEXT)
    return decoder.params, decoder.cache(context, batch=batch), tokens, positions


def traced(decoder: Decoder, args: tuple[Any, ...], target: Profile = SMALL) -> Traced:
    return mk.jit(decoder.step, batch=len(args[2]), target=target, interpret=True).trace(*args)


def check(decoder: Decoder, args: tuple[Any, ...], got: Any) -> None:
    """Logits and cache are those of the float32 reference."""
    want = decoder.reference(*args[1:])
    error = jnp.linalg.norm(got[1] - want[1], axis=1) / jnp.linalg.norm(want[1], axis=1)
    assert float(error.max()) < TOLERANCE
    for ours, theirs in zip(jax.tree.leaves(got[2]), jax.tree.leaves(want[2]), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=0.1, rtol=0.05)


def check_schedule(decoder: Decoder, args: tuple[Any, ...], schedule: Schedule, found: Traced) -> None:
    """The kernels of a schedule compute what the reference does."""
    check(decoder, args, found.lower(schedule=schedule).compile()(*args))


def with_tiles(graph: OpGraph, batch: int, gpu: Profile = SMALL, **wanted: dict[str, Any]) -> Schedule:
    """The best schedule in which phases have the fields that are asked for: wo={"split_k": 4}. Of the first ring that has any."""
    for ring in rings(graph):
        choices = {
            name: [(i, c) for i, c in found if all(getattr(c.plan, k) == v for k, v in wanted.get(name, {}).items())]
            for name, found in numbered(graph, batch, gpu, ring).items()
        }
        price = Prices(graph, Model(graph, batch, gpu, ring, released=False, padded_batch=padded(batch)))
        best = shortest_path(graph, choices, price, ring.capacity(gpu, ring.max_in_flight)) if all(choices.values()) else None
        if best is not None:
            return safe(graph, draft(graph, batch, Handoff.SENTINEL, Choice(gpu, ring, ring.max_in_flight, best)), gpu)
    raise AssertionError("no schedule has these fields")


def changed(graph: OpGraph, schedule: Schedule, gpu: Profile = SMALL, **fields: Any) -> Schedule:
    """A schedule in which all plans that have these fields have them so, with the same tasks."""

    def plan(p: Any) -> Any:
        return dataclasses.replace(p, **{k: v for k, v in fields.items() if k in {f.name for f in dataclasses.fields(p)}})

    return safe(graph, with_memory(graph, dataclasses.replace(schedule, phases=tuple(map(plan, schedule.phases)))), gpu)


def safe(graph: OpGraph, schedule: Schedule, gpu: Profile) -> Schedule:
    return timed(graph, with_handoffs(graph, schedule), gpu)
