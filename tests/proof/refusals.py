"""What the proof's tests share: a small GPU, schedules for it, and what the proof says of a broken one."""

import dataclasses
from typing import Any

import pytest
from oracle.graphs import tiny
from oracle.sources import with_workers

from mkdsl.graph import OpGraph
from mkdsl.proof import Rule, ScheduleError, verify_schedule
from mkdsl.schedule import Handoff, Profile, Schedule
from mkdsl.search._search import find

FEW = with_workers(4)  # fewer than tiles: every worker takes part in every phase


def schedule_of(graph: OpGraph, *, handoff: Handoff = Handoff.SENTINEL, batch: int = 1, gpu: Profile = FEW) -> Schedule:
    return find(graph, batch, gpu, handoff)


def refused(schedule: Schedule, rule: Rule, graph: OpGraph | None = None, gpu: Profile = FEW) -> str:
    """The message of the refusal, which must be by this rule."""
    with pytest.raises(ScheduleError) as error:
        verify_schedule(graph or tiny(), schedule, gpu)
    assert error.value.rule is rule, str(error.value)
    return str(error.value)


def with_phase(graph: OpGraph, name: str, **changes: Any) -> OpGraph:
    return dataclasses.replace(graph, phases=tuple(dataclasses.replace(p, **changes) if p.name == name else p for p in graph.phases))
