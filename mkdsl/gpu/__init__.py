"""Compiling for, launching on and measuring a GPU, and assembling for one that is not there."""

from mkdsl.gpu._assemble import Assembled, assemble, assemble_module
from mkdsl.gpu._device import detect, has_gpu, is_at_hand, require_gpu
from mkdsl.gpu._hang import HangError, raise_if_hung
from mkdsl.gpu._jit import Compiled, ContextError, Jitted, Lowered, TokenError, Traced, jit
from mkdsl.gpu._kept import Kept, NoContentError, committed, content, here, identity, keep_executables, kept, record
from mkdsl.gpu._measure import measure, measured_timeline
from mkdsl.gpu._probe import gpu_at_hand, probe, write_profile
from mkdsl.gpu._probe_fit import comparison
from mkdsl.gpu._races import RaceError

__all__ = [
    "Assembled", "Compiled", "ContextError", "HangError", "Jitted", "Kept", "Lowered", "NoContentError", "RaceError", "TokenError",
    "Traced", "assemble", "assemble_module", "committed", "comparison", "content", "detect", "gpu_at_hand", "has_gpu", "here", "identity",
    "is_at_hand", "jit", "keep_executables", "kept", "measure", "measured_timeline", "probe", "raise_if_hung", "record", "require_gpu",
    "write_profile",
]  # fmt: skip
