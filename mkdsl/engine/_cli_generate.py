"""`mkdsl generate`: text from a checkpoint, streamed to stdout; progress and speed on stderr."""

import collections
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import rich.console
import typer

from mkdsl.engine import _cli_sampling as options
from mkdsl.engine._answers import Delta
from mkdsl.engine._context import check_prompt, positions
from mkdsl.engine._engine import Engine
from mkdsl.engine._progress import loading_bar
from mkdsl.engine._sampling import SamplingParams
from mkdsl.engine._say import rehearse, say, stopped
from mkdsl.engine._speed import Speed
from mkdsl.engine._tokenizer import Tokenizer, load_tokenizer
from mkdsl.models import read_config

GREEDY = SamplingParams(temperature=0.0)
NO_PROMPT = "give --prompt TEXT, or pipe the text in (echo Hello | mkdsl generate DIR); mkdsl chat DIR is for a conversation"


def generate(
    directory: Annotated[pathlib.Path, typer.Argument(help="A Hugging Face checkpoint: config.json, safetensors, tokenizer.json.")],
    prompt: Annotated[
        str | None, typer.Option(help="The text to continue, or with --chat what the user says; - reads it from standard input.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    max_tokens: options.MaxTokens = None,
    context: options.Context = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    n: Annotated[int | None, typer.Option("--n", help="How many answers, one after the other.", rich_help_panel="Sampling")] = None,
) -> None:
    """Continue a prompt: greedily, or with --temperature by chance. Without --prompt, it is read from standard input."""
    chance = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed, "n": n}
    if temperature is None:
        _refuse_chance(chance)
    params = options.sampling(
        GREEDY, temperature=temperature, repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty, stop=stop, max_tokens=max_tokens, **chance,
    )  # fmt: skip
    tokenizer, tokens = _prepared(directory, prompt, chat, max_tokens, context)
    with loading_bar(f"loading {directory.resolve().name}") as progress:
        engine = Engine.load(directory, max_batch=1, context=context, tokenizer=tokenizer, progress=progress)
    with engine:
        show(rich.console.Console(stderr=True), engine, tokens, params)


def _refuse_chance(given: dict[str, Any]) -> None:
    """Options that would say nothing are refused, not ignored."""
    for name, value in given.items():
        if value is not None:
            option = "--" + name.replace("_", "-")
            raise typer.BadParameter(
                "without --temperature the most likely token is taken, and it says nothing; give one", param_hint=option
            )


def _prepared(
    directory: pathlib.Path, prompt: str | None, chat: bool, max_tokens: int | None, context: int | None
) -> tuple[Tokenizer, list[int]]:
    """The tokenizer and the prompt's tokens: what is wrong with the arguments is said before the weights are loaded."""
    config = read_config(directory)
    room = positions(config, context)
    text = _read_prompt(asked=prompt == "-") if prompt in (None, "-") else prompt
    tokenizer = load_tokenizer(directory)
    tokens = tokenizer.encode_chat([{"role": "user", "content": text}]) if chat else tokenizer.encode(text)
    check_prompt(config, room, tokens, max_tokens)
    return tokenizer, tokens


def _read_prompt(*, asked: bool) -> str:
    """All of standard input, but for the line end that comes last. A terminal is only read where that was asked for."""
    if sys.stdin.isatty() and not asked:
        raise typer.BadParameter(f"there is no prompt; {NO_PROMPT}")
    text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    if not text:
        raise typer.BadParameter(f"standard input is empty; {NO_PROMPT}")
    return text.removesuffix("\n").removesuffix("\r")


def show(console: rich.console.Console, engine: Engine, prompt: Sequence[int], params: SamplingParams) -> None:
    """Answers a prompt, streaming text to stdout and then its speed to the console.

    Args:
      console: for progress and speed.
      engine: with a max_batch of 1.
      prompt: token ids.
      params: how it is answered. Of several answers, each has a line above it that says which it is.

    Raises:
      As `Engine.stream`.
    """
    choice = -1

    def write(delta: Delta) -> None:
        nonlocal choice
        if params.n > 1 and delta.choice != choice:
            typer.echo(f"{'\n' * (choice >= 0)}=== {delta.choice + 1} of {params.n} ===")
        choice = delta.choice
        typer.echo(delta.text, nl=False)

    with console.status("compiling"):
        rehearse(engine, prompt, params)
    try:
        several, speed = say(console, engine, prompt, params, write)
    finally:
        if choice >= 0:
            typer.echo()  # what stopped it comes in a line of its own
    reasons = collections.Counter(stopped(engine, prompt, params, answer) for answer in several)
    console.print(summary(reasons, speed, engine.path), style="dim", highlight=False, markup=False, soft_wrap=True)


def summary(reasons: collections.Counter[str], speed: Speed, path: str) -> str:
    """One line: why it stopped, how fast each half went, and which path decoded."""
    several = reasons.total() > 1
    why = ", ".join(f"{count} x {reason}" if several else reason for reason, count in reasons.items())
    return f"{why} | {speed.prefill()} | {speed.decode(path)}"
