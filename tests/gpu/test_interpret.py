"""An interpreted kernel has a thread for everybody who may wait."""

import os
import subprocess
import sys

import pytest

USE = "mkdsl.jit(lambda *args: args, interpret=True)"


def run(code: str, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PJRT_NPROC"} | {"JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    return done.stderr


@pytest.mark.medium
def test_imported_first_there_is_room():
    assert run(f"import mkdsl, jax; jax.numpy.zeros(1); {USE}") == ""


@pytest.mark.medium
@pytest.mark.skipif((os.cpu_count() or 1) >= 512, reason="one thread per core is enough here")
def test_imported_late_it_says_so():
    late = f"import jax; jax.numpy.zeros(1); import mkdsl; {USE}"
    assert "RuntimeWarning: mk.jit(..., interpret=True) may sleep for ever" in run(late)
    assert run(late, PJRT_NPROC="512") == ""
