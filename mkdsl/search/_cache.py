"""Schedules on disk, by content: the same graph, batch, GPU and search always give the same schedule, so it is searched once."""

import functools
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

from mkdsl.graph import OpGraph
from mkdsl.schedule import Handoff, Profile, Schedule

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ("graph", "schedule", "proof", "simulate", "search")


def directory(kind: str = "schedules") -> pathlib.Path:
    """Where schedules are kept, or another kind of thing: $XDG_CACHE_HOME/mkdsl/schedules, by default under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "mkdsl" / kind


@functools.cache
def _source(root: pathlib.Path) -> str:
    """A hash of the source of all that a schedule depends on: another search may find another one."""
    digest = hashlib.sha256()
    for path in (p for package in SOURCES for p in sorted((root / package).rglob("*.py"))):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def key(graph: OpGraph, batch: int, profile: Profile, handoff: Handoff) -> str:
    """What identifies a schedule: everything the search depends on."""
    content: dict[str, Any] = {
        "graph": graph.to_json(),
        "batch": batch,
        "profile": profile.to_json(),
        "handoff": handoff,
        "source": _source(ROOT),
    }
    return _digest(json.dumps(content, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def load(key: str) -> Schedule | None:
    """The schedule kept under a key; None if there is none, or what is there is not what was stored."""
    try:
        digest, _, text = (directory() / f"{key}.json").read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return Schedule.from_json(json.loads(text)) if digest == _digest(text) else None


def store(key: str, schedule: Schedule) -> None:
    """Keeps a schedule. Atomic, so that nobody reads half of one; a directory that cannot be written to only costs time."""
    try:
        directory().mkdir(parents=True, exist_ok=True)
        text = json.dumps(schedule.to_json())
        with tempfile.NamedTemporaryFile("w", dir=directory(), suffix=".tmp", delete=False) as file:
            file.write(f"{_digest(text)}\n{text}")
        os.replace(file.name, directory() / f"{key}.json")
    except OSError:
        pass
