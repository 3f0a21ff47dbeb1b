"""`mkdsl explain`, and the refusals that the command line prints as one message."""

import json
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from found import found
from oracle.graphs import tiny
from stamps import stamped
from test_page import data_of
from typer.testing import CliRunner

from mkdsl.engine._cli import app
from mkdsl.engine._cli_explain import Explained, graph_of, run_on_gpu
from mkdsl.models import SHAPES, decode_step
from mkdsl.proof import verify_schedule
from mkdsl.schedule import Schedule, profile
from mkdsl.simulate import Timeline

H200 = profile("h200")


def test_explains_a_built_in_shape():
    out = CliRunner().invoke(app, ["explain", "smollm2-135m", "--context", "128"])
    assert out.exit_code == 0
    assert out.output.startswith("smollm2-135m on h200: batch 1, context 128, 132 workers, each an SM of its own\n  time ")
    for word in ("wg·wu", "the ring is", "us a step, predicted", "words (", "proven in"):
        assert word in out.output
    decided = r"^  wd +30 x  fold +\d+ +\d+  \d+ rows x split_k \d, tile_k \d+, epilogue of \d+, w?g?mma.*  wg·wu "
    assert re.search(decided, out.output, re.MULTILINE)


def test_explains_as_json():
    out = CliRunner().invoke(app, ["explain", "smollm2-135m", "--batch", "2", "--context", "128", "--json"])
    numbers = json.loads(out.output)
    assert set(numbers) == {
        "model", "target", "batch", "context", "smem_peak_bytes", "smem_peak_phase", "predicted_us", "floor_us", "search_seconds", "verify_seconds", "tasks",
        "phases", "schedule",
    }  # fmt: skip
    assert [numbers[name] for name in ("model", "target", "batch", "context")] == ["smollm2-135m", "h200", 2, 128]
    schedule = Schedule.from_json(numbers["schedule"])
    assert (schedule.batch, schedule.predicted_us, schedule.smem_bytes) == (2, numbers["predicted_us"], numbers["smem_peak_bytes"])
    verify_schedule(graph_of(SHAPES["smollm2-135m"], 128), schedule, H200)
    assert numbers["phases"] == 1 + 30 * 5 + 1
    assert 0 < numbers["smem_peak_bytes"] <= 227 * 1024


@pytest.mark.slow
@pytest.mark.medium
def test_without_k_splitting():
    """The paper's claim, in the model: at batch 16 the peak at least halves, and predicted time does not rise by more than 2 %."""
    split, whole = (
        json.loads(CliRunner().invoke(app, ["explain", "qwen3-1.7b", "--target", "l20", "--batch", "16", "--json", *o]).output)
        for o in ([], ["--no-k-split"])
    )
    assert 2 * split["smem_peak_bytes"] <= whole["smem_peak_bytes"]
    assert split["smem_peak_bytes"] <= 99 * 1024
    assert split["predicted_us"] <= 1.02 * whole["predicted_us"]


@pytest.mark.medium
def test_the_predicted_timeline_as_a_page_and_as_a_trace(tmp_path):
    file, page = tmp_path / "trace.json", tmp_path / "page.html"
    command = ["explain", "smollm2-135m", "--context", "128", "--target", "a100", "--trace", str(file), "--html", str(page)]
    out = CliRunner().invoke(app, command)
    assert out.exit_code == 0, out.output
    assert out.output.startswith("smollm2-135m on a100")
    assert data_of(page.read_text(encoding="utf-8"))["model"] == "smollm2-135m"
    assert 40_000 < page.stat().st_size < 200_000
    events = json.loads(file.read_text())["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    assert {e["tid"] for e in slices} == set(range(108))
    assert {"wo", "wg·wu", "wait", "fold"} <= {e["name"] for e in slices}
    assert all(e["dur"] >= 0 for e in slices)
    assert max(e["args"]["iteration"] for e in slices if e["name"] == "wo") == 29


@pytest.mark.parametrize("option", ["--html", "--trace"])
def test_a_file_that_cannot_be_written_is_refused_before_the_search(option, tmp_path, monkeypatch):
    monkeypatch.setattr("mkdsl.engine._cli_explain.config_of", pytest.fail)
    out = CliRunner().invoke(app, ["explain", "smollm2-135m", option, str(tmp_path / "nowhere" / "file")])
    assert out.exit_code == 2
    assert f"Invalid value for {option}: " in out.stderr and "cannot be written (No such file or directory)" in out.stderr


# Measured: the refusals, and the way from stamps to text, page and trace.


def gpu(capability="9.0", cores=132):
    return [types.SimpleNamespace(compute_capability=capability, device_kind="NVIDIA H200", core_count=cores)]


@pytest.mark.parametrize(
    ("devices", "options", "message"),
    [
        (None, [], "it runs the kernel, and there is no GPU here: jax's backend is 'cpu'"),
        (gpu(), ["--no-k-split"], "leave out --no-k-split"),
        (gpu("8.0", 108), [], "h200 has 132 SMs of compute capability 9.0, and NVIDIA H200 here 108 of 8.0; name its profile by --target"),
        (gpu("9.0", 114), [], "here 114 of 9.0"),
        (gpu(), ["--target", "b200"], "b200 has 148 SMs of compute capability 10.0, and NVIDIA H200 here 132 of 9.0"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_search(devices, options, message, monkeypatch):
    if devices:
        monkeypatch.setattr(jax, "devices", lambda: devices)
        monkeypatch.setattr("mkdsl.engine._cli_explain.has_gpu", lambda: True)
    monkeypatch.setattr("mkdsl.engine._cli_explain.config_of", pytest.fail)
    out = CliRunner().invoke(app, ["explain", "smollm2-135m", "--measured", *options])
    assert out.exit_code == 2
    assert out.stderr.startswith("mkdsl: Invalid value for --measured: ") and message in out.stderr
    assert len(out.stderr.splitlines()) == 1


@pytest.mark.medium
def test_what_was_measured_stands_beside_the_prediction(monkeypatch, tmp_path):
    """All but the kernel itself, whose stamps are those of the simulator, at half its pace."""
    monkeypatch.setattr(jax, "devices", gpu)
    monkeypatch.setattr("mkdsl.engine._cli_explain.has_gpu", lambda: True)
    monkeypatch.setattr("mkdsl.engine._cli_explain.run_on_gpu", lambda config, program: stamped(program.graph, program.schedule, H200, 2.0))
    page, trace = tmp_path / "page.html", tmp_path / "trace.json"
    command = ["explain", "smollm2-135m", "--context", "128", "--measured", "--html", str(page), "--trace", str(trace)]
    out = CliRunner().invoke(app, command)
    assert out.exit_code == 0, out.output
    assert re.search(r"^  measured +\d+ us, in the kernel with stamps; predicted -(49|50)\.\d%$", out.output, re.MULTILINE)
    timelines = [t["name"] for t in data_of(page.read_text(encoding="utf-8"))["timelines"]]
    assert timelines == ["predicted", "measured"]
    ends = {e["pid"]: 0.0 for e in json.loads(trace.read_text())["traceEvents"]}
    for e in json.loads(trace.read_text())["traceEvents"]:
        ends[e["pid"]] = max(ends[e["pid"]], e.get("ts", 0) + e.get("dur", 0))
    assert set(ends) == {0, 1} and ends[1] == pytest.approx(2 * ends[0], rel=1e-3)


def test_the_json_of_a_measurement_has_its_time():
    explained = Explained(
        model="tiny", graph=tiny(), schedule=found(tiny(), 3, H200), gpu=H200, alternatives=False, took=(1.0, 2.0),
        measured=Timeline((), (), 321.0, (), 0),
    )  # fmt: skip
    numbers = json.loads(json.dumps(explained.numbers()))
    assert (numbers["measured_us"], numbers["search_seconds"], numbers["verify_seconds"], numbers["context"]) == (321.0, 1.0, 2.0, 128)


@pytest.mark.medium
def test_a_program_is_run_on_random_weights_at_the_last_position(monkeypatch, shape):
    """It is called with what the decode step takes."""
    called = []
    monkeypatch.setattr("mkdsl.engine._cli_explain.measure", lambda program, *args: called.append(args) or "timeline")
    program: Any = types.SimpleNamespace(schedule=types.SimpleNamespace(batch=2), graph=types.SimpleNamespace(context=16))
    assert run_on_gpu(shape, program) == "timeline"
    (args,) = called
    assert jax.eval_shape(jax.vmap(decode_step(shape), (None, 0, 0, 0)), *args)[1].shape == (2, shape.vocab)
    assert args[3].tolist() == [15, 15]
    assert all(0.01 < jnp.std(a.astype(jnp.float32)) < 2 for a in jax.tree.leaves(args[:2]))


def test_without_k_splitting_the_gpu_stays_what_it_is():
    """What does not fit is shown beside what the GPU has, and what came second is not asked."""
    out = CliRunner().invoke(app, ["explain", "smollm2-135m", "--context", "128", "--target", "l20", "--batch", "16", "--no-k-split"])
    assert out.exit_code == 0, out.output
    assert re.search(r"^  shared memory  \d{3}(\.\d)? KiB of 99 KiB \(more than there is\) at the peak", out.output, re.MULTILINE)
    assert "what came second" not in out.output


def test_unknown_model_is_refused():
    out = CliRunner().invoke(app, ["explain", "gpt-9"])
    assert out.exit_code == 1
    assert "'gpt-9' is no directory and no built-in shape" in out.output


def test_explains_a_directory(checkpoint):
    about = json.loads((checkpoint / "config.json").read_text())
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 256}
    (checkpoint / "config.json").write_text(json.dumps(about | wide | {"head_dim": 64}))
    out = CliRunner().invoke(app, ["explain", str(checkpoint), "--context", "64"])
    assert out.exit_code == 0, out.output
    assert "2 x" in out.output


def test_a_directory_without_a_model(tmp_path):
    out = CliRunner().invoke(app, ["explain", str(tmp_path)])
    assert out.exit_code == 1
    assert out.stderr.startswith("mkdsl: ")
    assert "config.json" in out.stderr


def test_unknown_gpu_is_refused():
    out = CliRunner().invoke(app, ["explain", "smollm2-135m", "--target", "abacus"])
    assert out.exit_code == 2
    assert "no GPU profile 'abacus'" in out.output


def test_what_has_no_tiles_is_refused_in_one_line():
    out = CliRunner().invoke(app, ["explain", "smollm2-135m", "--context", "100"])
    assert out.exit_code == 1
    assert "make it one of 104" in out.stderr
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize(("message", "code"), [("no GPU: jax's backend is 'cpu'", 1), ("XLA fell over", None)])
def test_no_gpu_is_one_line_and_other_runtime_errors_are_not(monkeypatch, message, code):
    def refuse(_):
        raise RuntimeError(message)

    monkeypatch.setattr("mkdsl.engine._cli_explain.config_of", refuse)
    out = CliRunner().invoke(app, ["explain", "smollm2-135m"])
    assert (out.stderr == f"mkdsl: {message}\n") == (code is not None)
    assert isinstance(out.exception, SystemExit if code else RuntimeError)
