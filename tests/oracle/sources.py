"""Valid schedules to start from: of decoders of the shapes that real models have, and of random graphs. The same every time, everywhere."""

import dataclasses
import functools
import random
from typing import NamedTuple

from mkdsl.graph import OpGraph
from mkdsl.schedule import Handoff, Profile, Schedule, profile
from mkdsl.search._search import find
from oracle.graphs import free_running, llama, long_chain, parallel, random_graph, sandwich, tiny

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


def _source(graph: OpGraph, workers: int, batch: int, handoff: Handoff = Handoff.SENTINEL) -> Source:
    gpu = with_workers(workers)
    return Source(graph, find(graph, batch, gpu, handoff), gpu)


def _clustered(graph: OpGraph, workers: int) -> Source:
    gpu = where_clusters_pay(workers)
    return Source(graph, find(graph, 8, gpu, Handoff.SENTINEL), gpu)


@functools.cache
def decoders() -> tuple[Source, ...]:
    """Two layers of Llama-3.2-1B in full width; small ones with grouped and multi-query attention, a long context in splits, parallel blocks,
    norms around each block; loops of 2 to 5."""
    wide = llama(hidden=2048, layers=2, heads=32, kv_heads=8, head_dim=64, inner=8192, vocab=2048, context=512)
    split = llama(hidden=128, layers=3, heads=8, kv_heads=1, head_dim=64, inner=128, vocab=128, context=1024)
    multi_query = llama(hidden=192, layers=4, heads=3, kv_heads=1, head_dim=64, inner=192, vocab=64, context=64, window=32)
    found = [*(_source(wide, 6, 1, handoff) for handoff in Handoff), _clustered(wide, 6)]
    for graph in (tiny(2), tiny(3), split, multi_query, *each_order(parallel()), sandwich()):
        found += [_source(graph, w, 1 + w % 2, handoff) for w in (3, 4, 5, 6) for handoff in Handoff]
        found += [_clustered(graph, 4)]
    return tuple(found)


@functools.cache
def random_graphs(count: int = 48) -> tuple[Source, ...]:
    """Small ones, and a quarter as many wide enough to be shared by clusters, some in several epilogues."""
    handoffs = (Handoff.SENTINEL, Handoff.SENTINEL, Handoff.SENTINEL, Handoff.RELEASE_ACQUIRE)
    found = [_source(random_graph(_numbered(i)), 2 + i % 5, 1 + i % 3, handoffs[i % 4]) for i in range(count)]
    found += [_source(free_running(), n, 1, Handoff.RELEASE_ACQUIRE) for n in (3, 5)]
    found += [_source(long_chain(5, rows=128, repeats=3), workers, 1 + workers % 2) for workers in (2, 3, 4)]
    found += [_clustered(random_graph(_numbered(i), scale=(8, 4, 4)[i % 3]), 2 + 2 * (i % 2)) for i in range(count // 4)]
    return tuple(found)


def _numbered(index: int) -> random.Random:
    return random.Random(f"corpus {index}")


SOURCES = {"decoders": decoders, "random": random_graphs}
