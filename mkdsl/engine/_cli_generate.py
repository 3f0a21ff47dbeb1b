"""`mkdsl generate`: text from a checkpoint, streamed to stdout; progress and speed on stderr."""

import itertools
import pathlib
from typing import Annotated

import rich.console
import typer

from mkdsl.engine import _generate
from mkdsl.engine._generate import Model, Report, check_prompt, load_model, positions
from mkdsl.engine._tokenizer import Tokenizer, load_tokenizer
from mkdsl.models import read_config

STOPPED = {"eos": "the model ended its answer", "max_tokens": "--max-tokens reached", "context": "the context is full: see --context"}


def generate(
    directory: Annotated[pathlib.Path, typer.Argument(help="A Hugging Face checkpoint: config.json, safetensors, tokenizer.json.")],
    prompt: Annotated[str, typer.Option(help="The text to continue, or with --chat what the user says.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop after so many tokens; else when the context is full.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Positions in the KV cache.", show_default="2048")] = None,
) -> None:
    """Continue a prompt, greedily."""
    console = rich.console.Console(stderr=True)
    with console.status(f"loading {directory}"):
        tokenizer, tokens = _prepared(directory, prompt, chat, max_tokens, context)
        model = load_model(directory, context=context, tokenizer=tokenizer)
    show(console, model, tokens, max_tokens)


def _prepared(directory: pathlib.Path, prompt: str, chat: bool, max_tokens: int | None, context: int | None) -> tuple[Tokenizer, list[int]]:
    """The tokenizer and the prompt's tokens: what is wrong with the arguments is said before the weights are loaded."""
    config = read_config(directory)
    room = positions(config, context)
    tokenizer = load_tokenizer(directory)
    tokens = tokenizer.encode_chat([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
    check_prompt(config, room, tokens, max_tokens)
    return tokenizer, tokens


def show(console: rich.console.Console, model: Model, prompt: list[int], max_tokens: int | None) -> None:
    """Generates after a prompt, streaming text to stdout and then its speed to the console.

    Args:
      console: for progress and speed.
      model: a loaded model.
      prompt: token ids.
      max_tokens: see `generate`.

    Raises:
      ContextError: the prompt and max_tokens exceed the context.
    """
    generation = _generate.generate(model, prompt, max_tokens=max_tokens)
    pieces = model.tokenizer.stream(generation)
    with console.status(f"compiling, and prefill of {len(prompt)} tokens"):
        first = next(pieces, "")
    try:
        for piece in itertools.chain([first], pieces):
            typer.echo(piece, nl=False)
    finally:
        typer.echo()  # what stopped it comes in a line of its own
    assert generation.report is not None  # the pieces are exhausted
    console.print(summary(generation.report, model.decoder.path), style="dim", highlight=False, soft_wrap=True)


def summary(report: Report, path: str) -> str:
    """One line: why it stopped, and how fast each half went, and which path decoded."""
    prefill = _rate("prefill", report.prefill_tokens, report.prefill_seconds)
    decode = _rate(f"decode ({path})", report.decode_tokens, report.decode_seconds)
    return f"{STOPPED[report.stopped]} | {prefill} | {decode}"


def _rate(what: str, tokens: int, seconds: float) -> str:
    return f"{what}: {tokens} tokens, {tokens / seconds:.1f} tokens/s" if tokens else f"{what}: too short to time"
