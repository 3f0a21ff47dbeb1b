"""From an operator DAG to a verified schedule: hardware profiles, the shared-memory and cost models, the search, the simulator,
and the proof."""

from mkdsl.search._cost import floor_us
from mkdsl.search._profile import PROFILES, Profile, profile
from mkdsl.search._report import explain
from mkdsl.search._schedule import SHARING, PhasePlan, Schedule, TensorPlan
from mkdsl.search._search import search, without_k_split
from mkdsl.search._simulate import Span, Timeline, simulate
from mkdsl.search._smem import Extent, SharedMemory, shared_memory
from mkdsl.search._trace import trace_events
from mkdsl.search._verify import ScheduleError, verify_schedule
from mkdsl.search._work import FRAME

__all__ = [
    "FRAME", "PROFILES", "SHARING", "Extent", "PhasePlan", "Profile", "Schedule", "ScheduleError", "SharedMemory", "Span", "TensorPlan",
    "Timeline", "explain", "floor_us", "profile", "search", "shared_memory", "simulate", "trace_events", "verify_schedule", "without_k_split",
]  # fmt: skip
