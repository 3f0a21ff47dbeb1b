"""`mkdsl chat`, through a pipe and at a terminal."""

import json
import os
import pathlib
import pty
import re
import select
import subprocess
import sys
import types

import pytest
from typer.testing import CliRunner

from mkdsl.engine import Delta, Engine, SamplingParams, _cli_chat, load_tokenizer
from mkdsl.engine._cli import app
from mkdsl.engine._sizes import PAGE

ROOT = pathlib.Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"  # each token is a byte


@pytest.fixture
def directory(checkpoint):
    """A checkpoint whose template takes a system prompt."""
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    return checkpoint


def run(directory, text, *options):
    return CliRunner().invoke(app, ["chat", str(directory), *map(str, options)], input=text)


@pytest.fixture
def prompts(byte_tokenizer):
    """The texts that a script was asked to answer."""
    return lambda script: [byte_tokenizer.decode(prompt) for prompt, _ in script.asked]


def test_a_conversation_is_kept(directory, scripted, prompts):
    script = scripted("one</s>", "two</s>", "three</s>")
    result = run(directory, "a\n\nb\nc")
    assert (result.exit_code, result.stdout) == (0, "one\ntwo\nthree\n")
    assert prompts(script) == [
        "<user>a<assistant>", "<user>a<assistant>one<user>b<assistant>",
        "<user>a<assistant>one<user>b<assistant>two<user>c<assistant>",
    ]  # fmt: skip
    assert re.fullmatch(
        r"(the model ended its answer \| decode \(reference\): \d tokens, [\d.]+ tokens/s \| \d+ of 256 positions\n){3}", result.stderr
    )
    assert result.stderr.endswith(f"| {len(prompts(script)[2]) + 5} of 256 positions\n")


def test_the_next_turn_finds_the_one_before(directory, scripted):
    """Whole pages of it; only what is new is prefilled."""
    script = scripted("x" * 100 + "</s>", "y</s>")
    run(directory, "a" * 40 + "\nb")
    first, second = (len(prompt) for prompt, _ in script.asked)
    assert script.prefilled == [(0, first - 1), (PAGE, second - 1 - PAGE)]


def test_commands(directory, scripted, prompts):
    script = scripted("one</s>")
    result = run(directory, "a\n/system be kind\nb\n/reset\nc\n/system\nd\n /quit\n/quit\ne", "--system", "hello")
    assert result.stdout == "one\n" * 5
    assert prompts(script) == [
        "<system>hello<user>a<assistant>",
        "<system>be kind<user>a<assistant>one<user>b<assistant>",
        "<system>be kind<user>c<assistant>",
        "<user>c<assistant>one<user>d<assistant>",
        "<user>c<assistant>one<user>d<assistant>one<user> /quit<assistant>",
    ]
    assert "what was said is forgotten\n" in result.stderr


@pytest.mark.parametrize("line", ["/rest", "/reset now", "/quit now"])
def test_commands_that_there_are_not(directory, scripted, line):
    scripted("one</s>")
    result = run(directory, f"a\n{line}\nb")
    assert (result.exit_code, result.stdout) == (2, "one\n")
    assert f"mkdsl: Invalid value: there is no command '{line}'; /reset forgets what was said, /system TEXT" in result.stderr


def test_a_conversation_that_does_not_fit(directory, scripted, prompts):
    """Nothing is left out silently: it ends in a pipe, with numbers and what to do."""
    scripted("one</s>")
    result = run(directory, f"a\n{'b' * 30}\nc", "--context", 60)
    used = len(f"<user>a<assistant>one<user>{'b' * 30}<assistant>")
    assert (result.exit_code, result.stdout) == (1, "one\n")
    assert result.stderr.endswith(
        f"mkdsl: with this message the conversation takes {used} tokens of a context of 60, and nothing is left for an answer; the message is not sent. "
        "/reset forgets what was said, mkdsl chat --context N gives more room (this model may have up to 256 positions)\n"
    )


def test_no_more_room_is_offered_than_there_is(directory, scripted):
    scripted("one</s>")
    assert run(directory, "b" * 300).stderr.endswith("/reset forgets what was said\n")


@pytest.mark.parametrize(
    ("options", "text", "why"),
    [
        (["--context", 30], "one" * 4, "the context is full, and the answer ends here. /reset forgets"),
        (["--context", 30, "--max-tokens", 20], "one" * 4, "the context is full, and the answer ends here. /reset forgets"),
        (["--context", 30, "--max-tokens", 12], "one" * 4, "--max-tokens reached"),
        (["--max-tokens", 4], "oneo", "--max-tokens reached"),
        (["--stop", "neo"], "o", "it said 'neo': see --stop"),
    ],
)
def test_why_an_answer_ends(directory, scripted, options, text, why):
    scripted("one")
    result = run(directory, "a", *options)
    assert result.stdout == text + "\n"
    assert result.stderr.startswith(why)


@pytest.mark.parametrize(
    ("said", "options", "params"),
    [
        ({}, [], {"temperature": 0.7, "top_p": 0.95}),
        ({"temperature": 0.6, "top_k": 20}, [], {"temperature": 0.6, "top_k": 20}),
        ({"temperature": 0.6, "top_k": 20}, ["--temperature", 0, "--seed", 3], {"temperature": 0, "top_k": 20, "seed": 3}),
        ({}, ["--top-p", 0.5, "--min-p", 0.1], {"temperature": 0.7, "top_p": 0.5, "min_p": 0.1}),
    ],
)
def test_sampling(directory, scripted, said, options, params):
    (directory / "generation_config.json").write_text(json.dumps(said | {"eos_token_id": 257}))
    script = scripted("one</s>")
    run(directory, "a", *options, "--max-tokens", 9)
    ((_, asked),) = script.asked
    assert asked == SamplingParams(**params, max_tokens=9)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--system", "be kind"], 1, "mkdsl: {}: its chat template refuses this conversation (no system prompt)"),
        (["--context", 257], 1, "mkdsl: a context of 257 positions; it may have 1 to 256"),
        (["--top-p", 7], 2, "mkdsl: top_p=7.0; it is more than 0 and at most 1"),
        (["--temperature", "hot"], 2, "mkdsl: Invalid value for '--temperature'"),
        (["--system", b"\xe9".decode(errors="surrogateescape")], 1, r"mkdsl: the prompt has '\udce9', which is no character"),
    ],
)
def test_what_is_refused_before_a_weight_is_read(checkpoint, options, code, message):
    """By the template of the checkpoint itself, which takes no system prompt."""
    if "be kind" not in options:
        (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    (checkpoint / "model.safetensors").unlink()
    result = run(checkpoint, "a", *options)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1)
    assert result.stderr.startswith(message.format(checkpoint))


def test_a_model_that_is_none_for_chat(checkpoint):
    (checkpoint / "tokenizer_config.json").unlink()
    (checkpoint / "model.safetensors").unlink()
    result = run(checkpoint, "a")
    assert result.exit_code == 1
    assert "has no chat template, so this is no chat model; give it plain text: mkdsl generate without --chat" in result.stderr


def test_a_message_that_is_not_utf_8(directory, scripted):
    scripted("one</s>")
    result = run(directory, b"a\ncaf\xe9\nb")
    assert (result.exit_code, result.stdout) == (1, "one\n")
    assert r"mkdsl: the prompt has '\udce9', which is no character" in result.stderr


@pytest.mark.medium
def test_answers_are_the_models(directory):
    """A greedy one, and what comes after it."""
    result = run(directory, "hello\nand?", "--temperature", 0, "--max-tokens", 6)
    tokenizer, messages, expected = load_tokenizer(directory), [], []
    with Engine.load(directory, max_batch=1) as engine:
        for message in ("hello", "and?"):
            messages.append({"role": "user", "content": message})
            ((answer,),) = engine.generate([tokenizer.encode_chat(messages)], SamplingParams(temperature=0, max_tokens=6))
            messages.append({"role": "assistant", "content": answer.text})
            expected.append(answer.text)
    assert result.stdout.encode() == "".join(f"{text}\n" for text in expected).encode()


@pytest.fixture
def at_a_terminal(monkeypatch):
    """What is typed: lines, and KeyboardInterrupt for Ctrl-C. Then comes Ctrl-D. Returns the prompts that input() showed."""

    def types_(*typed, stdout=True):
        left, shown = iter([*typed, EOFError]), []

        def read(prompt=""):
            shown.append(prompt)
            if not isinstance(line := next(left), str):
                raise line
            return line

        terminal = types.SimpleNamespace(
            stdin=types.SimpleNamespace(isatty=lambda: True), stdout=types.SimpleNamespace(isatty=lambda: stdout)
        )
        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(_cli_chat, "sys", terminal)
        return shown

    return types_


def test_keys_at_the_prompt(directory, scripted, prompts, at_a_terminal):
    """Ctrl-C throws away what was typed, Ctrl-D ends."""
    script = scripted("one</s>")
    shown = at_a_terminal("a", KeyboardInterrupt, "b")
    result = run(directory, "")
    assert (result.exit_code, result.stdout) == (0, "one\none\n")
    assert len(prompts(script)) == 2
    assert shown == ["> "] * 4


def test_answers_alone_go_to_a_file(directory, scripted, at_a_terminal):
    scripted("one</s>")
    shown = at_a_terminal("a", "b", stdout=False)
    result = run(directory, "")
    assert (result.stdout, result.stderr.count("> "), set(shown)) == ("one\none\n", 3, {""})


@pytest.mark.parametrize("begun", [False, True])
def test_ctrl_c_during_an_answer(directory, scripted, prompts, monkeypatch, at_a_terminal, begun):
    """What was said of it stays, and so does its question; before it began, neither."""
    script, say = scripted("one</s>"), _cli_chat.say

    def interrupted(console, engine, prompt, params, show):
        if begun:
            show(Delta(prompt=0, choice=0, text="on", tokens=(1, 2), logprobs=(), finish=None))
        monkeypatch.setattr(_cli_chat, "say", say)
        raise KeyboardInterrupt

    monkeypatch.setattr(_cli_chat, "say", interrupted)
    at_a_terminal("a", "b")
    result = run(directory, "")
    assert result.exit_code == 0
    assert prompts(script) == ["<user>a<assistant>on<user>b<assistant>" if begun else "<user>b<assistant>"]
    assert ("stopped: what is there of the answer stays" if begun else "stopped before the answer began") in result.stderr


class Terminal:
    """A process at a terminal of its own: what it shows is read until something stands there."""

    def __init__(self, *arguments):
        ours, theirs = pty.openpty()
        attend = (
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # what a shell begins in the background ignores it
        )
        start = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); {attend}; from mkdsl.serve import main; main()"
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
        environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TERM": "xterm", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        command = [sys.executable, "-c", start, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=environment)
        os.close(theirs)
        self.file, self.shown, self.at = ours, "", 0

    def until(self, pattern):
        """Reads until this is shown, behind what was found before. Whoever sees nothing for a minute waits for ever."""
        while not (found := re.compile(pattern, re.DOTALL).search(self.shown, self.at)):
            assert select.select([self.file], [], [], 60)[0], f"{pattern} is not in {self.shown[self.at :]!r}"
            try:
                more = os.read(self.file, 4096)
            except OSError:  # the process has ended
                more = b""
            assert more, f"{pattern} is not in {self.shown[self.at :]!r}"
            self.shown += more.decode(errors="replace")
        self.at = found.end()

    def asks(self, line, *shown):
        """Types a line at the prompt, and reads until the answer shows these."""
        self.until("> ")
        self.types(f"{line}\n")
        for pattern in shown:
            self.until(pattern)

    def types(self, text):
        """A terminal takes no more than its reader leaves room for."""
        rest = text.encode()
        while rest:
            rest = rest[os.write(self.file, rest[:256]) :]


@pytest.mark.medium
def test_at_a_terminal(directory):
    """Ctrl-C stops an answer and not the program, what is refused does not end it either, and Ctrl-D does."""
    config = json.loads((directory / "config.json").read_text()) | {"max_position_embeddings": 100_000, "eos_token_id": []}
    (directory / "config.json").write_text(json.dumps(config))
    terminal = Terminal("chat", directory, "--temperature", 0, "--context", 4096)
    try:
        terminal.until("loading .*kB")
        terminal.until("/reset forgets.*/quit ends. Ctrl-C stops an answer, Ctrl-D ends")
        terminal.asks("hello", "prefill of 22 tokens", r"\x1b\[\?25h.*\x1b\[2K[^\r\n\x1b]")  # the spinner is gone, and something is said
        terminal.types("\x03")
        terminal.until(r"stopped: what is there of the answer stays in the conversation \| \d+ of 4096 positions")
        terminal.asks("/nothing", "there is no command '/nothing'; .*space before it")
        terminal.asks("b" * 4096, r"the conversation takes \d+ tokens of a context of 4096, .*; the message is not sent. /reset forgets")
        terminal.asks("/reset", "what was said is forgotten")
        terminal.until("> ")
        terminal.types("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.file)
