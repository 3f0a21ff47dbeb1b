"""A kernel's own time stamps as a timeline, to stand beside the simulator's."""

from typing import Any

import jax
import numpy as np

from mkdsl.graph import OpGraph
from mkdsl.lower import Program
from mkdsl.simulate import Span, Timeline, observed

RUNS = 5


def measure(program: Program, params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> Timeline:
    """Runs a program a few times with stamps, and returns the timeline of the run of median length. The stamps themselves cost some time.

    Args:
      program: in mega form, for the GPU at hand.
      params, kv, token, pos: what it is called with; kept.
    """
    step = jax.jit(program.timed)
    runs = [measured_timeline(program.graph, np.asarray(step(params, kv, token, pos)[1])) for _ in range(1 + RUNS)]
    return sorted(runs[1:], key=lambda t: t.us)[RUNS // 2]  # the first one also loads the code


def measured_timeline(graph: OpGraph, stamps: np.ndarray) -> Timeline:
    """The timeline of the stamps that `Program.timed` returns: int32 [workers, steps, 5], the low 32 bits of nanoseconds, zeros where a worker skips a step.
    Every worker is a cohort of its own, and time begins with the first stamp."""
    steps = [(name, i) for segment in graph.segments for i in range(segment.repeats) for name in segment.phases]
    took = stamps.any(axis=-1)
    since = (stamps - stamps[took][0, 0]).astype(np.int32)  # wraps around as the clock's low bits do
    us = (since - since[took].min()) / 1e3
    spans = [Span(worker, *steps[n], *map(float, us[worker, n])) for worker, n in np.argwhere(took).tolist()]
    return observed(graph, tuple((worker,) for worker in range(len(stamps))), spans)
