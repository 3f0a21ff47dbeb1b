import sys

import pytest
from typer.testing import CliRunner

from mkdsl import engine
from mkdsl.engine._cli import app
from mkdsl.engine._cli_generate import summary

REPORT = engine.Report(stopped="eos", prefill_tokens=10, prefill_seconds=0.5, decode_tokens=30, decode_seconds=2.0)


def run(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def test_generate_streams_text_and_reports_speed(checkpoint):
    result = run(checkpoint, "--prompt", "hello", "--max-tokens", 5)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("\n")
    assert "--max-tokens reached | prefill: 5 tokens, " in result.stderr
    assert "decode (reference): 4 tokens, " in result.stderr
    assert "tokens/s" not in result.stdout


def test_the_text_is_the_models(checkpoint):
    model = engine.load_model(checkpoint, context=32)
    prompt = model.tokenizer.encode_chat([{"role": "user", "content": "hé"}])
    expected = "".join(model.tokenizer.stream(engine.generate(model, prompt)))
    result = run(checkpoint, "--prompt", "hé", "--chat", "--context", 32)
    assert result.stdout == expected + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "hello", "--context", 10, "--max-tokens", 20], "mkdsl: the prompt takes 6 tokens of a context of 10, and 20 more"),
        (["--prompt", "hello", "--context", 1000], "mkdsl: a context of 1000 positions; this model has been made for 1 to 256"),
    ],
)
def test_refusals_are_one_message(checkpoint, arguments, message):
    result = run(checkpoint, *arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(message)
    assert "Traceback" not in result.stderr


def test_no_checkpoint(tmp_path):
    result = run(tmp_path / "nowhere", "--prompt", "hello")
    assert result.exit_code == 1
    assert "config.json: there is no such directory" in result.stderr


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
