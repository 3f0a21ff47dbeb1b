"""Benchmarks need a GPU to run. Without one: they say what they do, and the kernels that only they have assemble."""

import importlib.util
import pathlib
import re
import runpy
import subprocess
import sys
import types

import jax
import pytest

from mkdsl.gpu import assemble
from mkdsl.models import SHAPES, DecoderConfig

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"
BENCHMARKS = sorted(FOLDER.glob("[!_]*.py"))
TINY = DecoderConfig(
    hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate=32, vocab=64, eps=1e-5, theta=1e4, tied=True, max_context=128,
    bos=None, eos=(),
)  # fmt: skip


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


@pytest.fixture
def serve(monkeypatch, capfd):
    """Runs benchmarks/serve.py with a tiny model and few streams; returns its exit status, and the tables by their names."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    spec = importlib.util.spec_from_file_location("benchmarks_serve", FOLDER / "serve.py")  # tests have a package of the name
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments, streams):
        monkeypatch.setattr(module, "STREAMS", streams)
        sizes = ["--context", "128", "--prompt", "8", "--answer", "32"]
        monkeypatch.setattr(sys, "argv", ["serve.py", "tiny", *sizes, *arguments])
        with pytest.raises(SystemExit) as ended:
            module.main()
        out = capfd.readouterr().out
        tables = re.findall(r"^\n?(\w+)\n\n\| (.*) \|\n.*\n\| (.*) \|$", out, re.MULTILINE)
        return ended.value.code, {name: dict(zip(head.split(" | "), row.split(" | "), strict=True)) for name, head, row in tables}

    return run


@pytest.mark.medium
def test_serve_times_the_engine(serve):
    code, tables = serve("--arrivals", "1", streams=2)
    assert code == 0
    assert list(tables) == ["streams", "arrivals"]
    streams, arrivals = tables["streams"], tables["arrivals"]
    assert float(streams["1: token us"]) - float(streams["1: kernel us"]) == pytest.approx(float(streams["1: more"]), abs=2)
    assert float(streams["2: kernel us"]) / float(streams["2: token us"]) == pytest.approx(float(streams["2: of its tokens"]), abs=0.02)
    assert float(arrivals["requests/s"]) == pytest.approx(0.7 * 2e6 / float(streams["2: token us"]) / 32, rel=0.02)
    assert int(arrivals["requests"]) > 0


@pytest.mark.slow
def test_serve_gives_everything_back(serve):
    code, tables = serve("--arrivals", "1", "--clients", "6", "--seconds", "3", "--soak", "3", streams=4)
    assert code == 0
    assert tables["clients"]["lost"] == "0"
    assert {"whole", "streamed"} <= set(tables["clients"]["did"].replace(",", "").split())
    assert int(tables["soak"]["complete"]) and int(tables["soak"]["cancelled"])
    assert tables["soak"]["pages held"].startswith("0 of ") and tables["clients"]["pages held"].startswith("0 of ")


@pytest.mark.medium
def test_watchdog():
    code = "import threading, _watch\nwith _watch.Watchdog(0.5) as alive:\n    alive()\n    threading.Event().wait(60)"
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "line 4 in <module>" in done.stderr
