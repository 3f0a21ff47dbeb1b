"""`assemble` on kernels so small that one can say what must come out."""

import os
import re

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import utils as mu

from mkdsl.gpu import _compiler, assemble

THREADS = 128
VECTOR = jax.ShapeDtypeStruct((THREADS,), jnp.float32)
LANE = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def kernel(body, *scratch, shape=(THREADS,)):
    out = jax.ShapeDtypeStruct(shape, jnp.float32)
    return plgpu.kernel(body, out_type=out, scratch_types=scratch, grid=(1,), grid_names=("sm",), compiler_params=LANE)


def through_smem(x, out, there, barriers):
    there[...] = x[...]
    out[...] = there[...]


def writing(text: str):
    """A kernel that consists of one instruction, whose operand is where the result begins."""

    def body(x, out):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def go(ctx, ref):
            mu.inline_ptx(text, mu.memref_ptr(ref), has_side_effects=True)

        go(out)

    return kernel(body)


def test_what_a_kernel_takes():
    (found,) = assemble(kernel(through_smem, plgpu.SMEM((THREADS,), jnp.float32), plgpu.Barrier(num_barriers=3)), VECTOR)
    assert found.smem_bytes == 1024 + 3 * 8  # 512 bytes, aligned, and barriers
    assert 0 < found.registers < 64 and 0 < found.code_bytes < 8192
    assert found.stack_bytes == found.spill_bytes == 0
    assert "st.shared" in found.ptx and "Used" not in found.ptx
    assert f"Used {found.registers} registers" in found.log and ".target" not in found.log
    assert "ptx=" not in repr(found)


def test_every_architecture_in_one_process():
    once = jax.jit(writing("st.global.u32 [$0], 7;"))  # JAX keeps what it has lowered, but not from us
    for capability, target in (((9, 0), "sm_90a"), ((8, 0), "sm_80"), ((8, 9), "sm_89"), ((10, 0), "sm_100a"), ((9, 0), "sm_90a")):
        (found,) = assemble(once, VECTOR, capability=capability)
        assert re.findall(r"^\.target (\w+)", found.ptx, re.MULTILINE) == [target]


def test_spilled_registers():
    many = 400  # values of each thread, all of which are used after the last one has come

    def body(x, out):
        values = x[...]
        out[...] = values * jnp.sum(values)

    (found,) = assemble(kernel(body, shape=(many * THREADS,)), jax.ShapeDtypeStruct((many * THREADS,), jnp.float32))
    assert found.registers == 255 and found.spill_bytes > 4 * (many - 255) and found.stack_bytes > 0


def test_kernels_come_in_order():
    first, second = assemble(lambda x: writing("st.global.u32 [$0], 22;")(writing("st.global.u32 [$0], 11;")(x)), VECTOR)
    assert ", 11;" in first.ptx and ", 22;" in second.ptx


def test_no_kernel():
    with pytest.raises(ValueError, match="calls no Mosaic GPU kernel"):
        assemble(lambda x: x + 1, VECTOR)


def test_what_does_not_assemble():
    before, environment = mu._infer_arch, dict(os.environ)
    with pytest.raises(
        RuntimeError, match=r"(?s)does not assemble for compute capability \(9, 0\).*Not a name of any known instruction: 'nonsense'"
    ):
        assemble(writing("nonsense [$0];"), VECTOR)
    assert mu._infer_arch is before and dict(os.environ) == environment


def test_what_must_be_installed(monkeypatch):
    monkeypatch.setitem(_compiler.VERSIONS, _compiler.PLUGIN, "0.0.1")
    needed = "jax-cuda13-pjrt==0.0.1 nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88"
    assert _compiler.to_install() == needed.split()
    with pytest.raises(
        RuntimeError, match=rf"needs jax-cuda13-pjrt==0.0.1, .*: run `make setup`, or .* pip install .* --target .*{needed}$"
    ):
        assemble(writing("st.global.u32 [$0], 7;"), VECTOR)


def test_gcc_must_be_installed(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="needs gcc"):
        assemble(writing("st.global.u32 [$0], 7;"), VECTOR)
