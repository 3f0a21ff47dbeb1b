"""Real kernels through LLVM and ptxas, on a machine without a GPU, each for its own GPU's architecture: no spills, the shared memory that the
model says, within the instruction cache, no indirect branches."""

import jax
import jax.numpy as jnp
import pytest

from mkdsl.gpu import Assembled, Lowered, Traced, assemble, jit
from mkdsl.models import SHAPES, abstract_params, decode_step, init_cache
from mkdsl.schedule import PROFILES, SharedMemory, shared_memory

pytestmark = pytest.mark.medium

LIMIT = 112 * 1024  # bytes of code that Hopper's instruction caches hold under load; not known of others
CASES = [(target, model, batch) for target in PROFILES for model in SHAPES for batch in (1, 8)]
# Batches that are padded, and of 16 sequences, whose statistics take more than the least; the L20's resident has K stages.
CASES += [("h200", "smollm2-135m", 3), ("h200", "smollm2-135m", 16), ("l20", "qwen3-0.6b", 16)]
# Of each architecture one, both ways to fill the ring; batches with and without padding columns; clusters; widths of no power of two; K stages. Of the
# H100's ring three stages are in flight. The slow run has every built-in shape for every profile.
QUICK = {("h200", "smollm2-135m", 3), ("h100", "qwen3-0.6b", 8), ("l20", "qwen3-0.6b", 16)}


def trace(target: str, model: str, batch: int, deadline: float | None = None) -> Traced:
    config = SHAPES[model]
    kv = jax.eval_shape(lambda: init_cache(config, 4096, batch=batch))
    integers = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return jit(decode_step(config), batch=batch, target=target, deadline=deadline).trace(abstract_params(config), kv, integers, integers)


def the_kernel(lowered: Lowered, target: str = "h200") -> Assembled:
    (kernel,) = assemble(lowered.program, *lowered.signature, capability=PROFILES[target].capability)
    return kernel


def memory_of(traced: Traced) -> SharedMemory:
    s = traced.schedule()
    return shared_memory(traced.graph, s.phases, padded_batch=s.padded_batch, num_stages=s.num_stages, stage_bytes=s.stage_bytes)


@pytest.mark.parametrize(("target", "model", "batch"), [pytest.param(*c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in CASES])
def test_kernel_assembles(target, model, batch):
    gpu, traced = PROFILES[target], trace(target, model, batch)
    kernel, memory = the_kernel(traced.lower(), target), memory_of(traced)
    print(f"{model} batch {batch} for {target}: {kernel}\n{memory}")
    assert f".target sm_{gpu.capability[0]}{gpu.capability[1]}" in kernel.ptx
    assert ("cp.async.bulk" if gpu.tma else "cp.async.cg") in kernel.ptx
    assert kernel.spill_bytes == 0
    assert kernel.code_bytes <= LIMIT or gpu.capability[0] != 9
    assert kernel.smem_bytes == memory.allocated <= memory.total == traced.schedule().smem_bytes <= gpu.smem_bytes
    assert "brx" not in kernel.ptx


@pytest.mark.slow
@pytest.mark.parametrize(("target", "model", "batch"), CASES)
def test_kernel_with_a_deadline_assembles(target, model, batch):
    """No spills; the largest kernels may be a little larger than the caches, which then costs more than looking at the clock does."""
    kernel = the_kernel(trace(target, model, batch, deadline=1.0).lower(), target)
    print(f"{model} batch {batch} for {target}: {kernel}")
    assert kernel.spill_bytes == 0
    assert kernel.code_bytes <= LIMIT + 8 * 1024 or PROFILES[target].capability[0] != 9


def test_the_kernel_that_notes_times_assembles():
    lowered = trace("h200", "smollm2-135m", 1).lower()
    (kernel,) = assemble(lowered.program.timed, *lowered.signature, capability=(9, 0))
    assert kernel.spill_bytes == 0
    assert kernel.ptx.count("%globaltimer_lo") >= 5
