import collections
import dataclasses
import json
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from mkdsl import engine
from mkdsl.engine import Engine, SamplingParams, _cli_generate, loading_bar
from mkdsl.engine._backend import Backend
from mkdsl.engine._cli import app
from mkdsl.engine._cli_generate import GREEDY, summary
from mkdsl.engine._sampler import NOT_FINITE
from mkdsl.engine._speed import Speed
from mkdsl.graph import UnsupportedError


def run(*arguments, **options):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], **options)


@pytest.mark.medium
def test_the_text_is_the_models(checkpoint):
    with Engine.load(checkpoint, max_batch=1, context=32) as model:
        prompt = model.tokenizer.encode_chat([{"role": "user", "content": "hé"}])
        ((greedy,),) = model.generate([prompt], SamplingParams(temperature=0))
        ((drawn,),) = model.generate([prompt], SamplingParams(temperature=0.7, seed=3))
    result = run(checkpoint, "--prompt", "hé", "--chat", "--context", 32)
    assert result.stdout == greedy.text + "\n"
    decoded = len(greedy.tokens) - 1
    assert f"the context is full: see --context | prefill: {len(prompt) - 1} tokens, " in result.stderr
    assert f"decode (reference): {decoded} tokens, " in result.stderr
    assert "tokens/s" not in result.stdout
    assert run(checkpoint, "--prompt", "hé", "--chat", "--context", 32, "--temperature", 0.7, "--seed", 3).stdout == drawn.text + "\n"


def test_what_is_asked_of_the_engine(checkpoint, scripted):
    script = scripted("hello")
    given = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2}
    given |= {"frequency_penalty": -0.3, "seed": 11, "max_tokens": 3}
    options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert run(checkpoint, "--prompt", "x", *options, "--stop", "a", "--stop", "b").stdout == "hel\n"
    run(checkpoint, "--prompt", "x", "--max-tokens", 1)
    asked = [params for _, params in script.asked]
    assert asked[1] == SamplingParams(**given, stop=("a", "b"))
    assert asked[3] == dataclasses.replace(GREEDY, max_tokens=1)


@pytest.mark.parametrize(
    ("said", "options", "text", "why"),
    [
        ("hello</s>", [], "hello", "the model ended its answer"),
        ("hello", ["--max-tokens", 7], "hellohe", "--max-tokens reached"),
        ("hello", ["--context", 9], "hel", "the context is full: see --context"),
        ("hello</s>", ["--stop", "xyz", "--stop", "lo"], "hel", "it said 'lo': see --stop"),
        ("hello</s>", ["--stop", "xyz"], "hello", "the model ended its answer"),
    ],
)
def test_why_it_stopped(checkpoint, scripted, said, options, text, why):
    scripted(said)
    result = run(checkpoint, "--prompt", "hello", *options)
    assert result.stdout == text + "\n"
    assert result.stderr.startswith(f"{why} | prefill")


def test_several_answers(checkpoint, scripted):
    scripted("-", "one</s>", "two", "three</s>")  # the first is the rehearsal's
    result = run(checkpoint, "--prompt", "x", "--n", 3, "--temperature", 1, "--max-tokens", 6)
    assert result.stdout == "=== 1 of 3 ===\none\n=== 2 of 3 ===\ntwotwo\n=== 3 of 3 ===\nthree\n"
    assert result.stderr.startswith("2 x the model ended its answer, 1 x --max-tokens reached | prefill")


@pytest.mark.parametrize("length", [1, 5, 700])
def test_the_decode_step_is_compiled_before_it_is_timed(checkpoint, scripted, length):
    """Nothing of the prompt is found later."""
    config = json.loads((checkpoint / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (checkpoint / "config.json").write_text(json.dumps(config))
    script = scripted("a</s>")
    assert run(checkpoint, "--prompt", "x" * (length - 1), "--context", 1200).exit_code == 0
    (rehearsed, once), (prompt, _) = script.asked
    assert (len(rehearsed), once.max_tokens, rehearsed[0] == prompt[0]) == (1, 1, False)
    assert len(prompt) == length == 1 + sum(tokens for _, tokens in script.prefilled)


@pytest.mark.parametrize("options", [[], ["--prompt", "-"]])
@pytest.mark.parametrize(("given", "text"), [("hé\n", "hé"), ("two\nlines\n\n", "two\nlines\n"), ("dos\r\n", "dos"), ("no end", "no end")])
def test_a_prompt_from_standard_input(checkpoint, scripted, byte_tokenizer, options, given, text):
    script = scripted("a</s>")
    assert run(checkpoint, *options, input=given.encode()).stdout == "a\n"
    assert script.asked[1][0] == tuple(byte_tokenizer.encode(text).ids)


def test_a_prompt_in_the_arguments_leaves_standard_input_alone(checkpoint, scripted, byte_tokenizer):
    script = scripted("a</s>")
    run(checkpoint, "--prompt", "x", input="y")
    assert script.asked[1][0] == tuple(byte_tokenizer.encode("x").ids)


WHAT_TO_DO = "give --prompt TEXT, or pipe the text in (echo Hello | mkdsl generate DIR); mkdsl chat DIR is for a conversation"


@pytest.mark.parametrize("options", [[], ["--prompt", "-"]])
def test_nothing_on_standard_input(checkpoint, options):
    refused(run(checkpoint, *options, input=""), f"mkdsl: Invalid value: standard input is empty; {WHAT_TO_DO}", code=2)


def test_no_prompt_at_a_terminal(checkpoint, monkeypatch):
    terminal = types.SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(_cli_generate, "sys", types.SimpleNamespace(stdin=terminal))
    refused(run(checkpoint), f"mkdsl: Invalid value: there is no prompt; {WHAT_TO_DO}", code=2)


def test_standard_input_that_is_not_utf_8(checkpoint):
    refused(run(checkpoint, input=b"caf\xe9"), r"mkdsl: the prompt has '\udce9', which is no character: it is not UTF-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", -1], "mkdsl: temperature=-1.0; it is 0, which takes the most likely token, or a positive number"),
        (["--temperature", 1, "--top-p", 1.5], "mkdsl: top_p=1.5; it is more than 0 and at most 1"),
        (["--temperature", 1, "--n", 0], "mkdsl: n=0; it is an integer of at least 1"),
        (["--max-tokens", 0], "mkdsl: max_tokens=0; it is None, or an integer of at least 1"),
        (["--repetition-penalty", 0], "mkdsl: repetition_penalty=0.0; it is a number from 1e-6 to 1e6"),
        (["--stop", ""], "mkdsl: stop=('',); it is a tuple of strings, none of them empty"),
        *(
            (
                [option, value],
                f"mkdsl: Invalid value for {option}: without --temperature the most likely token is taken, and it says nothing",
            )
            for option, value in {"--top-k": 3, "--top-p": 0.9, "--min-p": 0.1, "--seed": 1, "--n": 2}.items()
        ),
    ],
)
def test_sampling_that_means_nothing(checkpoint, options, message):
    (checkpoint / "model.safetensors").unlink()
    refused(run(checkpoint, "--prompt", "x", *options), message, code=2)


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
        (["generate", "here", "--prompt", "x", "--max-tokens", "many"], "mkdsl: Invalid value for '--max-tokens'"),
        (["generate", "here", "--prompt", "x", "--context", "0"], "mkdsl: Invalid value for '--context'"),
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

    monkeypatch.setattr("mkdsl.engine._engine.decode_steps", refuse)
    monkeypatch.setattr("mkdsl.engine._engine.load", None)  # not reached
    refused(run(checkpoint, "--prompt", "hello"), "mkdsl: attention has head_dim=40")


@pytest.mark.medium
def test_weights_that_are_no_numbers(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": np.full_like(tensors["model.norm.weight"], np.nan)}, path)
    refused(run(checkpoint, "--prompt", "hello"), "mkdsl: the logits after 6 tokens are NaN or infinite; a weight is no number")


def test_what_was_said_before_an_error_keeps_its_line(checkpoint, scripted):
    scripted([65, NOT_FINITE])
    result = run(checkpoint, "--prompt", "hello")
    assert (result.exit_code, result.stdout.count("\n"), result.stderr.count("\n")) == (1, 1, 1)
    assert len(result.stdout) == 2
    assert result.stderr.startswith("mkdsl: the logits after 7 tokens are NaN or infinite")


def test_the_device_fails(checkpoint, scripted, monkeypatch):
    scripted("a")
    monkeypatch.setattr(Backend, "decode", lambda *_, **__: 1 / 0)
    refused(run(checkpoint, "--prompt", "hello"), "mkdsl: a step failed on the device (ZeroDivisionError: division by zero)")


def test_no_checkpoint(tmp_path):
    result = run(tmp_path / "nowhere", "--prompt", "hello")
    refused(result, f"mkdsl: {tmp_path / 'nowhere' / 'config.json'}: there is no such directory")


def test_chat_without_a_template(checkpoint):
    (checkpoint / "tokenizer_config.json").unlink()
    result = run(checkpoint, "--prompt", "hello", "--chat")
    assert result.exit_code == 1
    assert "has no chat template" in result.stderr


def test_bugs_keep_their_traceback(checkpoint, monkeypatch):
    monkeypatch.setattr(Engine, "load", lambda *_, **__: 1 / 0)
    assert isinstance(run(checkpoint, "--prompt", "hello").exception, ZeroDivisionError)


def test_summary():
    speed = Speed(prefill_tokens=10, first_tokens=1, first_seconds=0.5625, decode_tokens=32, decode_seconds=2.0)
    assert (
        summary(collections.Counter(["the model ended its answer"]), speed, "kernel")
        == "the model ended its answer | prefill: 10 tokens, 20.0 tokens/s | decode (kernel): 32 tokens, 16.0 tokens/s"
    )


def test_a_bar_while_weights_are_loaded(monkeypatch, capsys):
    for name in ("NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
    with loading_bar("loading [here]") as progress:
        for done in range(0, 8_000_000, 2_000_000):
            progress(done, 8_000_000)
    shown = capsys.readouterr()
    assert "loading [here]" in shown.err and "6.0/8.0 MB" in shown.err and "B/s" in shown.err
    assert shown.out == ""


def test_no_bar_without_a_terminal(monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with loading_bar("loading") as progress:
        progress(6, 8)
    assert capsys.readouterr() == ("", "")


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
