import json
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from mkdsl import engine
from mkdsl.engine._cli import app
from mkdsl.engine._cli_generate import summary
from mkdsl.engine._generate import LogitsError
from mkdsl.graph import UnsupportedError

REPORT = engine.Report(stopped="eos", prefill_tokens=10, prefill_seconds=0.5, decode_tokens=30, decode_seconds=2.0)


def run(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


@pytest.mark.medium
def test_generate_streams_text_and_reports_speed(checkpoint):
    result = run(checkpoint, "--prompt", "hello", "--max-tokens", 5)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("\n")
    assert "--max-tokens reached | prefill: 5 tokens, " in result.stderr
    assert "decode (reference): 4 tokens, " in result.stderr
    assert "tokens/s" not in result.stdout


@pytest.mark.medium
def test_the_text_is_the_models(checkpoint):
    model = engine.load_model(checkpoint, context=32)
    prompt = model.tokenizer.encode_chat([{"role": "user", "content": "hé"}])
    expected = "".join(model.tokenizer.stream(engine.generate(model, prompt)))
    result = run(checkpoint, "--prompt", "hé", "--chat", "--context", 32)
    assert result.stdout == expected + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "hello", "--context", 10, "--max-tokens", 20], "mkdsl: the prompt takes 5 tokens of a context of 10, and 20 more"),
        (["--prompt", "hello", "--context", 1000], "mkdsl: a context of 1000 positions; it may have 1 to 256"),
        (
            ["--prompt", b"caf\xe9".decode(errors="surrogateescape")],
            r"mkdsl: the prompt has '\udce9', which is no character: it is not UTF-8",
        ),
        (["--prompt", ""], "mkdsl: the prompt has no tokens"),
        (["--prompt", "hello", "--chat"], "mkdsl: {}: its chat template fails on this conversation (TypeError: "),
    ],
)
def test_what_the_arguments_get_wrong_is_one_line_before_a_weight_is_read(checkpoint, arguments, message):
    (checkpoint / "chat_template.jinja").write_text("{{ messages + 1 }}")
    model = checkpoint / "tokenizer.json"
    model.write_text(json.dumps(json.loads(model.read_text()) | {"post_processor": None}))  # an empty prompt has no tokens then
    (checkpoint / "model.safetensors").unlink()
    refused(run(checkpoint, *arguments), message.format(checkpoint))


def refused(result, message, code=1):
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "here"], "mkdsl: Missing option '--prompt'"),
        (["generate", "here", "--prompt", "x", "--max-tokens", "0"], "mkdsl: Invalid value for '--max-tokens'"),
        (["explain", "smollm2-135m", "--batch", "17"], "mkdsl: Invalid value for '--batch'"),
        (["explain", "smollm2-135m", "--target", "abacus"], "mkdsl: Invalid value for --target: no GPU profile 'abacus'"),
        (
            ["explain", "smollm2-135m", "--trace", "nowhere/trace.json"],
            "mkdsl: Invalid value for --trace: nowhere/trace.json cannot be written (No such file or directory)",
        ),
        (["explain", "smollm2-135m", "--trace", "."], "mkdsl: Invalid value for --trace: . cannot be written (Is a directory)"),
    ],
)
def test_arguments_that_are_none_are_one_line_too(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mkdsl.engine._cli_explain.graph_of", None)  # not reached
    refused(CliRunner().invoke(app, arguments), message, code=2)


def test_a_context_that_would_take_for_ever(monkeypatch):
    monkeypatch.setattr("mkdsl.engine._cli_explain.graph_of", None)  # not reached
    result = CliRunner().invoke(app, ["explain", "smollm2-135m", "--context", "640000000"])
    refused(result, "mkdsl: a context of 640000000 positions; it may have 1 to 1048576")


CONFIGS = {
    "rms_norm_eps": (None, "rms_norm_eps=None; it should be a positive number"),
    "rope_theta": ("7", "rope_theta='7'; it should be a positive number"),
    "rope_scaling": ("linear", "rope_scaling='linear'; it should be an object of parameters"),
    "eos_token_id": (["</s>"], "eos_token_id=['</s>']; it should be a token's number"),
}


@pytest.mark.parametrize("key", CONFIGS)
def test_checkpoints_that_are_refused(checkpoint, key):
    value, message = CONFIGS[key]
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused(run(checkpoint, "--prompt", "hello"), f"mkdsl: {path}: {message}")
    refused(CliRunner().invoke(app, ["explain", str(checkpoint)]), f"mkdsl: {path}: {message}")


def test_what_a_kernel_does_not_take(checkpoint, monkeypatch):
    def refuse(*_):
        raise UnsupportedError("attention has head_dim=40; kernels have heads of 64 to 256 features")

    monkeypatch.setattr("mkdsl.engine._generate.default_decoder", refuse)
    monkeypatch.setattr("mkdsl.engine._generate.load", None)  # not reached
    refused(run(checkpoint, "--prompt", "hello"), "mkdsl: attention has head_dim=40")


@pytest.mark.medium
def test_weights_that_are_no_numbers(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": np.full_like(tensors["model.norm.weight"], np.nan)}, path)
    refused(run(checkpoint, "--prompt", "hello"), "mkdsl: the logits after 6 tokens are NaN or infinite; a weight is no number")


def test_what_was_said_before_an_error_keeps_its_line(checkpoint, monkeypatch):
    def stops(*_, **__):
        yield 65
        raise LogitsError("the logits are NaN")

    monkeypatch.setattr("mkdsl.engine._cli_generate._generate.generate", stops)
    result = run(checkpoint, "--prompt", "hello")
    assert (result.exit_code, result.stdout.count("\n"), result.stderr) == (1, 1, "mkdsl: the logits are NaN\n")


def test_no_checkpoint(tmp_path):
    result = run(tmp_path / "nowhere", "--prompt", "hello")
    refused(result, f"mkdsl: {tmp_path / 'nowhere' / 'config.json'}: there is no such directory")


def test_chat_without_a_template(checkpoint):
    (checkpoint / "tokenizer_config.json").unlink()
    result = run(checkpoint, "--prompt", "hello", "--chat")
    assert result.exit_code == 1
    assert "has no chat template" in result.stderr


def test_bugs_keep_their_traceback(checkpoint, monkeypatch):
    monkeypatch.setattr("mkdsl.engine._cli_generate.load_model", lambda *_, **__: 1 / 0)
    assert isinstance(run(checkpoint, "--prompt", "hello").exception, ZeroDivisionError)


def test_summary():
    assert (
        summary(REPORT, "kernel")
        == "the model ended its answer | prefill: 10 tokens, 20.0 tokens/s | decode (kernel): 30 tokens, 15.0 tokens/s"
    )


def test_summary_of_one_token():
    report = engine.Report(stopped="max_tokens", prefill_tokens=0, prefill_seconds=0.0, decode_tokens=0, decode_seconds=0.0)
    assert summary(report, "reference") == "--max-tokens reached | prefill: too short to time | decode (reference): too short to time"


def test_main_runs_the_app(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mkdsl", "--help"])
    with pytest.raises(SystemExit) as done:
        engine.main()
    assert done.value.code == 0
    assert "generate" in capsys.readouterr().out


def test_main_without_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mkdsl.engine._cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r'mkdsl: the package typer is not installed: pip install "mkdsl\[hf\]"'):
        engine.main()
