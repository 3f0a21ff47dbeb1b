"""`mkdsl explain`, and the refusals that the command line prints as one message."""

import json
import re

import pytest
from typer.testing import CliRunner

from mkdsl.engine._cli import app


def test_explains_a_built_in_shape():
    out = CliRunner().invoke(app, ["explain", "smollm2-135m", "--context", "128"])
    assert out.exit_code == 0
    for word in ("wg·wu", "ring:", "predicted:", "proven in"):
        assert word in out.output
    decided = r"^  wd +30 x  fold +\d+ +\d+  \d+ rows x split_k \d, tile_k \d+, epilogue of \d+, w?g?mma.*  wg·wu "
    assert re.search(decided, out.output, re.MULTILINE)


def test_explains_as_json():
    out = CliRunner().invoke(app, ["explain", "smollm2-135m", "--batch", "2", "--context", "128", "--json"])
    numbers = json.loads(out.output)
    assert set(numbers) == {
        "smem_peak_bytes", "smem_peak_phase", "predicted_us", "floor_us", "search_seconds", "verify_seconds", "tasks", "phases",
    }  # fmt: skip
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


def test_the_predicted_timeline_is_a_trace(tmp_path):
    file = tmp_path / "trace.json"
    out = CliRunner().invoke(app, ["explain", "smollm2-135m", "--context", "128", "--target", "a100", "--trace", str(file)])
    assert out.exit_code == 0, out.output
    events = json.loads(file.read_text())["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    assert {e["tid"] for e in events} == set(range(108))
    assert {"wo", "wg·wu", "wait", "fold"} <= {e["name"] for e in slices}
    assert all(e["dur"] >= 0 for e in slices)
    assert max(e["args"]["iteration"] for e in slices if e["name"] == "wo") == 29


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
