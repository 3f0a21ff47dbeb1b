"""Valid schedules to start from: of decoders of the shapes that real models have, and of random graphs. The same every time."""

import dataclasses
import functools
from typing import NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from oracle.graphs import free_running, graphs, llama, long_chain, parallel, sandwich, tiny

from mkdsl.graph import OpGraph
from mkdsl.schedule import Profile, Schedule, profile
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


@functools.cache
def decoders() -> tuple[Source, ...]:
    """Two layers of Llama-3.2-1B in full width; small ones with grouped and multi-query attention, a long context in splits, parallel blocks,
    norms around each block; loops of 2 to 5."""
    wide = llama(hidden=2048, layers=2, heads=32, kv_heads=8, head_dim=64, inner=8192, vocab=2048, context=512)
    split = llama(hidden=128, layers=3, heads=8, kv_heads=1, head_dim=64, inner=128, vocab=128, context=1024)
    multi_query = llama(hidden=192, layers=4, heads=3, kv_heads=1, head_dim=64, inner=192, vocab=64, context=64, window=32)
    found = [_source(wide, 6, 1, handoff) for handoff in ("data", "counter")]
    found.append(_source(wide, 6, 8, "data", clusters=True))
    for graph in (tiny(2), tiny(3), split, multi_query, *each_order(parallel()), sandwich()):
        found += [_source(graph, w, 1 + w % 2, h) for w in (3, 4, 5, 6) for h in ("data", "counter")]
        found += [_source(graph, 4, 8, "data", clusters=True)]
    return tuple(found)


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


SOURCES = {"decoders": decoders, "random": random_graphs}
