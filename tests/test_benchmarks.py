"""Benchmarks need a GPU to run. Without one: they say what they do, and the kernels that only they have assemble."""

import pathlib
import runpy
import sys
import types

import jax
import pytest

from mkdsl.gpu import assemble

BENCHMARKS = sorted((pathlib.Path(__file__).parent.parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmark_says_what_it_does(path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.medium
@pytest.mark.parametrize(("instruction", "store"), [("mma", None), ("mma", "again"), ("wgmma", "once")])
def test_kernels_of_units_assemble(instruction, store, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(core_count=132)])
    kernel = runpy.run_path(str(next(path for path in BENCHMARKS if path.stem == "units")))["kernel"]
    (found,) = assemble(kernel(8, 4, 256, instruction, store))
    assert found.spill_bytes == 0
    assert ("wgmma.mma_async" in found.ptx) == (instruction == "wgmma")
