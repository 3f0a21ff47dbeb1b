"""Valid schedules to start from: of decoders of the shapes that real models have, and of random graphs. The same every time."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from search_graphs import free_running, graphs, llama, long_chain, parallel, sandwich, tiny

from mkdsl.graph import OpGraph
from mkdsl.search import Profile, Schedule, profile
from mkdsl.search._assign import assign_all
from mkdsl.search._draft import with_memory
from mkdsl.search._protocol import made_safe, with_handoffs
from mkdsl.search._search import find

H200 = profile("h200")


class Source(NamedTuple):
    graph: OpGraph
    schedule: Schedule
    gpu: Profile


def each_order(graph: OpGraph) -> tuple[OpGraph, ...]:
    """The graph in each of its orders, as a graph that has no other."""
    return tuple(dataclasses.replace(g, others=()) for g in (graph, *graph.others))


def with_workers(workers: int) -> Profile:
    return dataclasses.replace(H200, workers=workers)


def where_clusters_pay(workers: int) -> Profile:
    """Reading takes long."""
    return dataclasses.replace(with_workers(workers), load_us=5.0)


def _source(graph: OpGraph, workers: int, batch: int, handoff: str, *, clusters: bool = False) -> Source:
    gpu = where_clusters_pay(workers) if clusters else with_workers(workers)
    return Source(graph, find(graph, batch, gpu, handoff), gpu)


def fetching(source: Source) -> Source:
    """The same tiles with tasks as they were assigned, and no rows kept."""
    s, graph = source.schedule, source.graph
    plans = assign_all(graph, [dataclasses.replace(p, own=()) for p in s.phases], batch=s.batch, workers=s.workers)
    return Source(source.graph, with_memory(graph, with_handoffs(graph, dataclasses.replace(s, phases=plans))), source.gpu)


@functools.cache
def decoders() -> tuple[Source, ...]:
    """Two layers of Llama-3.2-1B in full width; small ones with grouped and multi-query attention, a long context in splits, parallel blocks,
    norms around each block; loops of 2 to 5. Of those whose workers keep rows some as they are without."""
    wide = llama(hidden=2048, layers=2, heads=32, kv_heads=8, head_dim=64, inner=8192, vocab=2048, context=512)
    split = llama(hidden=128, layers=3, heads=8, kv_heads=1, head_dim=64, inner=128, vocab=128, context=1024)
    multi_query = llama(hidden=192, layers=4, heads=3, kv_heads=1, head_dim=64, inner=192, vocab=64, context=64, window=32)
    found = [_source(wide, 6, 1, handoff) for handoff in ("data", "counter")]
    found.append(_source(wide, 6, 8, "data", clusters=True))
    for graph in (tiny(2), tiny(3), split, multi_query, *each_order(parallel()), sandwich()):
        found += [_source(graph, w, 1 + w % 2, h) for w in (3, 4, 5, 6) for h in ("data", "counter")]
        found += [_source(graph, 4, 8, "data", clusters=True)]
    keeping = [s for s in found if any(p.own for p in s.schedule.phases) and {t.handoff for t in s.schedule.tensors} == {"data"}]
    return (*found, *(fetching(s) for s in keeping if s.schedule.workers == 6))


@functools.cache
def random_graphs(count: int = 48) -> tuple[Source, ...]:
    found: list[OpGraph] = []

    @seed(11)
    @settings(max_examples=count, database=None, phases=[Phase.generate], deadline=None, suppress_health_check=list(HealthCheck))
    @given(graphs())
    def collect(graph: OpGraph) -> None:
        found.append(graph)

    collect()
    plain = [_source(g, 2 + i % 5, 1 + i % 3, "counter" if i % 4 == 3 else "data") for i, g in enumerate(found)]
    plain += [_source(free_running(), n, 1, "counter") for n in (3, 5)]
    plain += [_source(long_chain(5, rows=128, repeats=3), workers, 1 + workers % 2, "data") for workers in (2, 3, 4)]
    return (*plain, *(_source(g, 2 + 2 * (i % 2), 8, "data", clusters=True) for i, g in enumerate(found[: count // 4])))


@functools.cache
def groups() -> tuple[Source, ...]:
    """Those of the others in full width or random in which what attention reads may have several events; and small decoders, two events, on so many
    workers that few have rows of both. All with the waits that they then need."""
    long = llama(hidden=128, layers=3, heads=4, kv_heads=2, head_dim=64, inner=256, vocab=192, context=1024)
    few = [_source(g, 8, b, h) for g in (tiny(3), *each_order(parallel())) for b, h in ((2, "data"), (4, "counter"))]
    few += [_source(long, 8, b, "data", clusters=True) for b in (1, 4)]
    return tuple(grouped for source in (*decoders()[:3], *random_graphs(), *few) for grouped in _grouped(source))


def _grouped(source: Source) -> Iterator[Source]:
    graph = source.graph
    for attention in (p for p in graph.phases if p.kind == "attention"):
        for plan in (p for p in source.schedule.phases if not set(attention.reads).isdisjoint(graph.phase(p.name).writes)):
            events = math.gcd(attention.kv_heads, *(part.rows // plan.rows for part in graph.phase(plan.name).parts))
            phases = tuple(dataclasses.replace(p, events=events) if p is plan else p for p in source.schedule.phases)
            safe = made_safe(graph, dataclasses.replace(source.schedule, phases=phases)) if events > 1 else None
            if safe:
                yield source._replace(schedule=safe)


SOURCES = {"decoders": decoders, "random": random_graphs, "groups": groups}
