"""Real kernels through LLVM and ptxas, on a machine without a GPU: no spills, within the instruction cache, no indirect branches."""

import importlib.util
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import pytest

from mkdsl.gpu import jit
from mkdsl.models import SHAPES, abstract_params, decode_step, init_cache

TOOL = pathlib.Path(__file__).parents[3] / "shared" / "tools" / "aot_check.py"
LIMIT = 112 * 1024  # bytes of code that Hopper's instruction caches hold under load
CASES = [(m, b) for m in ("llama-3.2-1b", "llama-3.1-8b", "qwen3-0.6b", "qwen3-8b", "smollm2-135m") for b in (1, 8)]

pytestmark = pytest.mark.skipif(not TOOL.exists() or not shutil.which("ptxas"), reason="aot_check.py or ptxas is absent")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("model", "batch"), CASES)
def test_kernel_assembles(model, batch, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # a cold search; the tool's own cache is elsewhere
    monkeypatch.setenv("MKDSL_AOT_CACHE", str(pathlib.Path.home() / ".cache" / "mkdsl-aot"))
    spec = importlib.util.spec_from_file_location("aot_check", TOOL)
    aot_check = importlib.util.module_from_spec(spec)
    import sys

    monkeypatch.setitem(sys.modules, "aot_check", aot_check)
    spec.loader.exec_module(aot_check)
    config = SHAPES[model]
    kv = jax.eval_shape(lambda: init_cache(config, 4096, batch=batch))
    integers = jax.ShapeDtypeStruct((batch,), jnp.int32)
    start = time.perf_counter()
    lowered = jit(decode_step(config), batch=batch, target="h200").lower(abstract_params(config), kv, integers, integers)
    assert time.perf_counter() - start < 30
    (report,) = aot_check.compile_report(lambda *a: lowered.program(*a), *lowered.signature)
    print(f"{model} batch {batch}: {report.registers} registers, {report.code_bytes} bytes of code, {report.smem_bytes} of shared memory")
    assert report.spill_bytes == 0
    assert report.code_bytes <= LIMIT
    assert report.smem_bytes <= 227 * 1024
    assert "brx" not in pathlib.Path(report.ptx).read_text()
