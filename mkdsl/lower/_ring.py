"""The ring through which everything streamed goes: what its two roles do with a stage.

A unit fills one stage with two copies. Before the loader issues it, its stage must be free and the unit `max_in_flight` places earlier must have
landed: bytes in flight are the latency of everybody's hand-offs. Where the GPU has a tensor memory accelerator (TMA), that copies, and says itself
when a unit has landed; else the loader's own threads copy (`cp.async`), and say so.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.lower._machine import Machine, i32
from mkdsl.lower._types import Buffer, Index, Ref
from mkdsl.lower.mosaic import _copies


def barriers(num_stages: int, *, tma: bool) -> list[tuple[str, Buffer]]:
    """full: a stage's unit has landed, of which each of two TMA copies tells by itself, or the loader once. empty: compute is done with it."""
    arrivals = 2 if tma else 1
    full = plgpu.Barrier(num_arrivals=arrivals, num_barriers=num_stages)
    return [("full", full), ("empty", plgpu.Barrier(num_barriers=num_stages))]


def slot_of(m: Machine, i: Index) -> Index:
    """The stage of unit i."""
    return lax.rem(i, m.schedule.num_stages)


# Compute.


def await_unit(m: Machine, slot: Index) -> None:
    """Waits until the unit in a stage has landed."""
    plgpu.barrier_wait(m.refs["full"].at[slot])


def free_stage(m: Machine, slot: Index) -> None:
    """Gives a stage back to the loader."""
    if m.interpret:
        plgpu.commit_smem()  # the race detector wants the last ordinary read ordered before the next copy
    plgpu.barrier_arrive(m.refs["empty"].at[slot])


# The loader.


def claim(m: Machine, i: Index) -> None:
    """Waits until unit i may be issued: its stage is free, and unit i - max_in_flight has landed.

    Without TMA nobody else says that a unit has landed, so the loader does, before it waits for anybody.
    """
    num_stages, behind = m.schedule.num_stages, m.schedule.max_in_flight
    if not m.tma:
        pl.when(i >= behind)(lambda: _land(m, i - behind, behind - 1))

    @pl.when(i >= num_stages)
    def _() -> None:
        plgpu.barrier_wait(m.refs["empty"].at[slot_of(m, i)])

    if m.tma:
        pl.when(i >= behind)(lambda: await_unit(m, slot_of(m, i - behind)))


def copy(m: Machine, source: Ref, there: Ref, layout: tuple, slot: Index, valid: Index = None) -> None:
    """One of a unit's two copies, asynchronous. layout: of the stage. valid: how many of its rows there are, if it may reach behind the array,
    which TMA knows by itself."""
    if m.tma:
        plgpu.copy_gmem_to_smem(source, there, m.refs["full"].at[slot])
    else:
        _copies.copy_async(source, there, layout, valid)


def _land(m: Machine, i: Index, later: int) -> None:
    """Waits for unit i, behind which `later` units have been issued, and tells compute."""
    _copies.wait_copies(2 * later)
    plgpu.barrier_arrive(m.refs["full"].at[slot_of(m, i)])


def land_last(m: Machine, units: Index) -> None:
    """After all units: without TMA the last `max_in_flight` of them have yet to land."""
    for later in reversed(range(0 if m.tma else m.schedule.max_in_flight)):
        i = units - 1 - later
        pl.when(i >= 0)(lambda i=i, later=later: _land(m, i, later))


def drain(m: Machine, units: Index) -> None:
    """Observes what is left of every barrier's phases, which interpret mode insists on."""

    def last(n: int, barriers: Ref) -> None:
        def one(k: Index, _: None) -> None:
            i = units - n + k

            @pl.when(i >= 0)
            def _() -> None:
                plgpu.barrier_wait(barriers.at[slot_of(m, jnp.maximum(i, 0))])

        lax.fori_loop(0, n, lambda k, c: (one(k, None), c)[1], i32(0))

    last(m.schedule.max_in_flight, m.refs["full"])
    last(m.schedule.num_stages, m.refs["empty"])
