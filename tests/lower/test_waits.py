"""What workers of a kernel with a deadline note of the waits that they give up, and what is read out of it. That kernels do note it is tested on a
GPU: tests/gpu/test_hang.py."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tiny_decoders

import mkdsl as mk
from mkdsl.lower import GivenUp, Machine, Wait, Wanted, _events
from mkdsl.lower._waits import first_note, given_up, mask, number, signals_wanted, waits
from mkdsl.lower.mosaic import _ptx
from mkdsl.schedule import profile

NAME = "h200 with 8 SMs"


@pytest.fixture(scope="module")
def kernel():
    """(graph, schedule) of a small model."""
    decoder, one = tiny_decoders.of(tiny_decoders.LLAMA), np.int32(3)
    target = dataclasses.replace(profile("H200"), name=NAME, workers=8)
    traced = mk.jit(decoder.step, target=target).trace(decoder.params, decoder.cache(128), one, one)
    schedule = traced.schedule()
    return traced.graph.in_order(schedule.order), schedule


def left_by(kernel, *noted):
    """The counters of a kernel whose workers have noted this."""
    graph, schedule = kernel
    notes = np.full((schedule.workers, 2), -1, np.int32)
    for g in noted:
        seen = g.seen - 1 if g.wait.wanted is Wanted.EVENT else mask(graph.phase(g.wait.phase), g.tensors)  # events' counters begin at -1
        notes[g.worker] = number(graph, schedule, g.wait, g.iteration), seen
    return np.concatenate([np.full(first_note(graph), 7, np.int32), notes.reshape(-1)])


def event(kernel, phase, before, *, iteration, missing, worker=0):
    graph, schedule = kernel
    wanted = signals_wanted(graph, schedule, graph.phase(phase), graph.phase(before), iteration)
    return GivenUp(worker=worker, wait=Wait(phase, Wanted.EVENT, before), iteration=iteration, wanted=wanted, seen=wanted - missing)


def test_the_waits_of_a_model(kernel):
    graph, schedule = kernel
    found = waits(graph, schedule)
    assert len(set(found)) == len(found)
    assert {w.phase for w in found if w.wanted is Wanted.DATA} == {p.name for p in graph.phases}
    assert [w.event for w in found if w.phase == "wo" and w.event] == ["attention"]


@hypothesis.given(data=st.data())
def test_what_was_noted_is_read(kernel, data):
    graph, schedule = kernel
    wait = data.draw(st.sampled_from(waits(graph, schedule)))
    phase, iteration = graph.phase(wait.phase), data.draw(st.integers(0, 200))
    worker = data.draw(st.integers(0, schedule.workers - 1))
    if wait.event:
        one = event(kernel, wait.phase, wait.event, iteration=iteration, missing=data.draw(st.integers(1, 300)), worker=worker)
    else:
        reads = tuple(dict.fromkeys((*phase.reads, *phase.row_reads)))
        of = tuple(t for t in reads if wait.wanted is Wanted.DATA and data.draw(st.booleans()))
        one = GivenUp(worker=worker, wait=wait, iteration=iteration, tensors=of)
    assert given_up(graph, schedule, left_by(kernel, one)) == [one]


def test_nobody_gave_up(kernel):
    assert given_up(*kernel, left_by(kernel)) == []


def test_the_least_advanced_come_first(kernel):
    graph, _ = kernel
    head = graph.segments[-1].phases[0]
    noted = [
        event(kernel, head, graph.segments[1].phases[-1], iteration=0, missing=1, worker=0),
        event(kernel, "attention", "wq+wk+wv", iteration=1, missing=3, worker=1),
        event(kernel, "wo", "attention", iteration=0, missing=1, worker=2),
        event(kernel, "wo", "attention", iteration=0, missing=2, worker=3),
    ]
    assert [g.worker for g in given_up(*kernel, left_by(kernel, *noted))] == [3, 2, 1, 0]


def test_so_many_signals_are_wanted_as_the_kernel_waits_for(kernel, monkeypatch):
    graph, schedule = kernel
    targets: list[int] = []
    monkeypatch.setattr(_ptx, "fence", lambda: None)
    monkeypatch.setattr(_ptx, "wait_for", lambda counter, target, **_: targets.append(int(target)))
    monkeypatch.setattr(_events, "_counter", lambda m, phase: None)
    monkeypatch.setattr(_events.pl, "when", lambda condition: lambda do: do() if condition else None)
    m = Machine(graph, schedule, interpret=False, concurrent=True, tma=True)
    for phase in graph.phases:
        for iteration in range(graph.iterations(phase)):
            targets.clear()
            _events.wait(m, phase, iteration)
            earlier = [graph.phase(b) for b in schedule.plan(phase.name).waits]
            once = [b for b in earlier if b.segment == phase.segment or iteration == 0]  # what came before the loop is waited for once
            wanted = [signals_wanted(graph, schedule, phase, b, iteration) for b in once]
            assert targets == [n for n in wanted if n]  # of the iteration before the first: none
