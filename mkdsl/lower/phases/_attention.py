"""Attention: items are (sequence, kv head, split), and each is folded block of the cache by block. In a cluster all workers fold a share of each
other's items and send the result to the item's owner."""

import functools

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax
from jax.experimental import pallas as pl

from mkdsl.graph import AttentionPhase, Leaf
from mkdsl.lower import _exchange
from mkdsl.lower._machine import Machine, bf16, f32
from mkdsl.lower._ring import claim, copy, slot_of
from mkdsl.lower._tile import kv_view, kv_written
from mkdsl.lower._types import Buffer, Index
from mkdsl.lower._walk import Epilogue, Place, cache_at, cache_of, kv_blocks, kv_item, kv_share, over_epilogues, over_peers, place
from mkdsl.lower.phases._attention_item import Item, carry_words, query_columns
from mkdsl.schedule import AttentionPlan, Schedule


def plan_of(m: Machine, phase: AttentionPhase) -> AttentionPlan:
    plan = m.schedule.plan(phase.name)
    assert isinstance(plan, AttentionPlan)
    return plan


# Shared memory.


def ring_views(phase: AttentionPhase, plan: AttentionPlan, schedule: Schedule) -> dict[str, Buffer]:
    """The ring as blocks of keys or of values."""
    return {f"stage.{phase.name}": kv_view(schedule.num_stages, schedule.stage_bytes, phase.head_dim)}


def buffers(phase: AttentionPhase, plan: AttentionPlan, batch: int) -> list[dict[str, Buffer]]:
    """Queries, probabilities, the result, scores, the new token's key and value; in a cluster what the peers send."""
    columns, d = query_columns(phase), phase.head_dim
    found = {
        "q": plgpu.SMEM((columns, d), bf16),
        "p": plgpu.SMEM((plan.block, columns), bf16),
        "out": plgpu.SMEM((d, columns), f32),
        "score": plgpu.SMEM((columns,), f32),
        "new": plgpu.SMEM((2, d), bf16),
    }
    if plan.cluster > 1:
        found["received"] = plgpu.SMEM((plan.sets, carry_words(phase)), f32)
    return [{f"{name}.{phase.name}": buffer for name, buffer in found.items()}]


# The loader.


def load(m: Machine, phase: AttentionPhase, iteration: Index, i: Index) -> Index:
    """Issues all units of an attention, in the order in which compute folds them: an item of each worker of the cluster at a time."""
    plan = plan_of(m, phase)

    def items(e: Epilogue, peer: Index, i: Index) -> Index:
        first, at, count = e.items(m, phase, 0, peer)
        return lax.fori_loop(0, count, lambda t, i: _load_item(m, phase, plan, first + at + t, peer, iteration, i), i)

    return over_epilogues(m, phase, lambda e, i: over_peers(m, phase, functools.partial(items, e), i), i)


def _load_item(m: Machine, phase: AttentionPhase, plan: AttentionPlan, item: Index, peer: Index, iteration: Index, i: Index) -> Index:
    sequence, head, split = kv_item(plan, phase, item)
    first, n = kv_blocks(m, plan, phase, sequence, kv_share(m, plan, split, peer))
    view, half = m.refs[f"stage.{phase.name}"], plan.block // 2

    def unit(i: Index, places: list[Place], start: Index, cache: Leaf) -> Index:
        claim(m, i)
        slot = slot_of(m, i)
        for h, at in enumerate(places):
            source, index = cache_at(m, cache, iteration, head, at, half)
            valid = phase.context - (start + h * half) if phase.context % plan.block else None
            copy(m, source.at[index], view.at[slot, pl.ds(h * half, half)], kv_written(phase.head_dim), slot, valid)
        return i + 1

    def block(j: Index, i: Index) -> Index:
        start = (first + j * (plan.splits * plan.cluster)) * plan.block
        places = [place(m, phase, sequence, start + h * half) for h in range(2)]
        keys, values, _ = cache_of(m, phase)
        return unit(unit(i, places, start, keys), places, start, values)

    return lax.fori_loop(0, n, block, i)


# Compute.


def compute(m: Machine, phase: AttentionPhase, iteration: Index, i: Index) -> Index:
    """One execution of attention by a worker that has items of it, or shares a peer's; i counts ring units."""
    plan = plan_of(m, phase)
    if plan.cluster > 1:
        return over_epilogues(m, phase, lambda e, i: _shared(m, phase, plan, e, iteration, i), i)
    first, n = m.tasks(phase, 0)

    def one(t: Index, i: Index) -> Index:
        item, i = _fold(m, phase, plan, first + t, None, iteration, i)
        item.hand_over(item.kept())
        return i

    return lax.fori_loop(0, n, one, i)


def _fold(
    m: Machine, phase: AttentionPhase, plan: AttentionPlan, number: Index, peer: Index, iteration: Index, i: Index
) -> tuple[Item, Index]:
    """Folds this worker's share of an item, which is a peer's, or its own if None, and keeps the result."""
    sequence, head, split = kv_item(plan, phase, number)
    item = Item(m, phase, plan, iteration, sequence, head, split, kv_share(m, plan, split, peer))
    carry = item.first_carry(item.prepare())
    m.stamp(phase, iteration, "read")
    _, blocks = kv_blocks(m, plan, phase, item.sequence, item.share)
    m_, z, *sums, i = lax.fori_loop(0, blocks, item.fold_block, (*carry, i))
    m.stamp(phase, iteration, "folded")
    item.append()
    item.keep(m_, z, sums)
    return item, i


def _shared(m: Machine, phase: AttentionPhase, plan: AttentionPlan, e: Epilogue, iteration: Index, i: Index) -> Index:
    """An item of each worker of the cluster, where it has one left, folded by all and written by its owner."""
    number = _exchange.round_number(m)
    first, at, mine = e.items(m, phase, 0)
    _exchange.expect(m, number, mine * plan.cluster * carry_words(phase))

    def folded(peer: Index, i: Index) -> Index:
        first, at, count = e.items(m, phase, 0, peer)

        def one(t: Index, i: Index) -> Index:
            item, i = _fold(m, phase, plan, first + at + t, peer, iteration, i)
            item.send(number, peer)
            return i

        return lax.fori_loop(0, count, one, i)

    i = over_peers(m, phase, folded, i)
    _exchange.receive(m, phase, iteration, number)

    @pl.when(mine > 0)
    def _() -> None:
        item = Item(m, phase, plan, iteration, *kv_item(plan, phase, first + at), None)
        item.hand_over(item.merged([_exchange.buffer(m, phase, number, source) for source in range(plan.cluster)]))

    return i
