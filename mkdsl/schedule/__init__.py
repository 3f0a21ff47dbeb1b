"""What is decided, as data, and what everyone may know of it.

Here are the plan of a kernel (`Schedule`), the GPU it is for (`Profile`), the shared memory it takes, and the rules by which it is executed. It
builds on `mkdsl.graph` and never imports those who find, prove, play or lower a schedule.
"""

from mkdsl.schedule._builtin import PROFILES, profile
from mkdsl.schedule._handoff import Handoff
from mkdsl.schedule._phase_plans import EPILOGUE_VALUES, MMA_ROWS, SHARING, AttentionPlan, FoldPlan, MapPlan, PhasePlan, Range, Tasks
from mkdsl.schedule._plan import Schedule, TensorPlan, narrowest
from mkdsl.schedule._profile import KIB, Curve, Profile, interpolate
from mkdsl.schedule._rules import Awaited, awaited, clears, home, read_instance, releases, signals, written_instance
from mkdsl.schedule._shared_memory import Extent, SharedMemory, attention_extents, columns, fixed_bytes, fold_extents, shared_memory

__all__ = [
    "EPILOGUE_VALUES", "KIB", "MMA_ROWS", "PROFILES", "SHARING", "AttentionPlan", "Awaited", "Curve", "Extent", "FoldPlan", "Handoff", "MapPlan", "PhasePlan",
    "Profile", "Range", "Schedule", "SharedMemory", "Tasks", "TensorPlan", "attention_extents", "awaited", "clears", "columns", "fixed_bytes",
    "fold_extents", "home", "interpolate", "narrowest", "profile", "read_instance", "releases", "shared_memory", "signals", "written_instance",
]  # fmt: skip
