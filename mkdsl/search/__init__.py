"""From an operator DAG to a verified schedule: hardware profiles, the shared-memory and cost models, the search, and the proof."""

from mkdsl.search._profile import PROFILES, Profile, profile
from mkdsl.search._report import explain
from mkdsl.search._schedule import PhasePlan, Schedule, TensorPlan
from mkdsl.search._search import search
from mkdsl.search._smem import Extent, SharedMemory, shared_memory
from mkdsl.search._verify import ScheduleError, verify_schedule

__all__ = [
    "PROFILES", "Extent", "PhasePlan", "Profile", "Schedule", "ScheduleError", "SharedMemory", "TensorPlan", "explain", "profile",
    "search", "shared_memory", "verify_schedule",
]  # fmt: skip
