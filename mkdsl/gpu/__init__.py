"""Compiling for and launching on a GPU."""

from mkdsl.gpu._device import detect, has_gpu, require_gpu
from mkdsl.gpu._jit import Compiled, ContextError, Jitted, Lowered, Traced, jit

__all__ = ["Compiled", "ContextError", "Jitted", "Lowered", "Traced", "detect", "has_gpu", "jit", "require_gpu"]
