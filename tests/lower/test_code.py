"""Real kernels through LLVM and ptxas, on a machine without a GPU, each for its own GPU's architecture: no spills, within shared memory and
the instruction cache, no indirect branches."""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from mkdsl.gpu import jit
from mkdsl.models import SHAPES, abstract_params, decode_step, init_cache
from mkdsl.schedule import PROFILES

TOOL = pathlib.Path(__file__).parents[3] / "shared" / "tools" / "aot_check.py"
LIMIT = 112 * 1024  # bytes of code that Hopper's instruction caches hold under load; not known of others
CASES = [(target, model, batch) for target in PROFILES for model in SHAPES for batch in (1, 8)]
NARROW = ("b200", "smollm2-135m", 8)  # stages q, k and v's resident in blocks narrower than those it could reduce in
QUICK = [("h200", 1), ("h200", 8), ("a100", 1), ("l20", 1)]  # of all models but one between two of its family


def marks(target, model, batch):
    quick = ((target, batch) in QUICK and model != "qwen3-1.7b") or (target, model, batch) == NARROW
    return [] if quick else [pytest.mark.slow]


@pytest.fixture(scope="module")
def assembler():
    """A process per architecture: within one, the compiler keeps to the first it was asked for."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda _: stack.enter_context(ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))))


def trace(target, model, batch):
    config = SHAPES[model]
    kv = jax.eval_shape(lambda: init_cache(config, 4096, batch=batch))
    integers = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return jit(decode_step(config), batch=batch, target=target).trace(abstract_params(config), kv, integers, integers)


def assemble(target, model, batch, cache):
    """What aot_check reports of a kernel, and the seconds it took to search and lower it."""
    os.environ |= {"XDG_CACHE_HOME": cache, "MKDSL_AOT_CACHE": str(pathlib.Path.home() / ".cache" / "mkdsl-aot")}
    sys.path.insert(0, str(TOOL.parent))
    import aot_check

    start = time.perf_counter()
    lowered = trace(target, model, batch).lower()
    seconds = time.perf_counter() - start
    (report,) = aot_check.compile_report(lambda *a: lowered.program(*a), *lowered.signature, arch=PROFILES[target].capability)
    return dataclasses.asdict(report), seconds


@pytest.mark.skipif(not TOOL.exists() or not shutil.which("ptxas"), reason="aot_check.py or ptxas is absent")
@pytest.mark.parametrize(("target", "model", "batch"), [pytest.param(*c, marks=marks(*c)) for c in CASES])
def test_kernel_assembles(target, model, batch, assembler, tmp_path):
    gpu = PROFILES[target]
    report, seconds = assembler(gpu.capability).submit(assemble, target, model, batch, str(tmp_path)).result()  # a cold search
    print(f"{model} batch {batch} for {target}:", *(f"{key} {report[key]}" for key in ("registers", "code_bytes", "smem_bytes")))
    ptx = pathlib.Path(report["ptx"]).read_text()
    assert f".target sm_{gpu.capability[0]}{gpu.capability[1]}" in ptx
    assert ("cp.async.bulk" if gpu.tma else "cp.async.cg") in ptx
    assert report["spill_bytes"] == 0
    assert report["code_bytes"] <= LIMIT or gpu.capability[0] != 9
    assert report["smem_bytes"] <= gpu.smem_bytes
    assert "brx" not in ptx
    assert seconds < 30


def code_with_stamps(cache):
    """Spilled bytes and PTX of the kernel that notes times."""
    os.environ |= {"XDG_CACHE_HOME": cache}
    sys.path.insert(0, str(TOOL.parent))
    import aot_check

    lowered = trace("h200", "smollm2-135m", 1).lower()
    (report,) = aot_check.compile_report(lambda *a: lowered.program.timed(*a), *lowered.signature, arch=(9, 0))
    return report.spill_bytes, pathlib.Path(report.ptx).read_text()


@pytest.mark.skipif(not TOOL.exists() or not shutil.which("ptxas"), reason="aot_check.py or ptxas is absent")
def test_the_kernel_that_notes_times_assembles(assembler, tmp_path):
    spills, ptx = assembler((9, 0)).submit(code_with_stamps, str(tmp_path)).result()
    assert spills == 0
    assert ptx.count("%globaltimer_lo") >= 5
