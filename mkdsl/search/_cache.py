"""Schedules on disk, by content: the same graph, batch, GPU and search always give the same schedule, so it is searched once."""

import json
import pathlib
from typing import Any

from mkdsl.graph import OpGraph
from mkdsl.schedule import Handoff, Profile, Schedule
from mkdsl.search._files import digest, directory, read, source_digest, write

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ("graph", "schedule", "proof", "simulate", "search")  # all that a schedule depends on: another search may find another one


def key(graph: OpGraph, batch: int, profile: Profile, handoff: Handoff) -> str:
    """What identifies a schedule: everything the search depends on."""
    content: dict[str, Any] = {
        "graph": graph.to_json(),
        "batch": batch,
        "profile": profile.to_json(),
        "handoff": handoff,
        "source": source_digest(ROOT, SOURCES),
    }
    return digest(json.dumps(content, sort_keys=True).encode())


def load(key: str) -> Schedule | None:
    """The schedule kept under a key; None if there is none, or what is there is not what was stored."""
    content = read(_path(key))
    return None if content is None else Schedule.from_json(json.loads(content))


def store(key: str, schedule: Schedule) -> None:
    """Keeps a schedule."""
    write(_path(key), json.dumps(schedule.to_json()).encode())


def _path(key: str) -> pathlib.Path:
    return directory() / f"{key}.json"
