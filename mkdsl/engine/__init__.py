"""From a checkpoint to text: many requests at once, each as if it were alone; and the command line."""

import sys
from collections.abc import Callable

from mkdsl.engine._answers import Answer, Delta, LogitsError, Logprob, answers
from mkdsl.engine._engine import Engine, Stats
from mkdsl.engine._loop import EngineError
from mkdsl.engine._progress import loading_bar
from mkdsl.engine._sampling import SamplingError, SamplingParams
from mkdsl.engine._scheduler import BATCHES, PagesError
from mkdsl.engine._smollm2 import fetch_smollm2
from mkdsl.engine._tokenizer import PromptError, Tokenizer, load_tokenizer
from mkdsl.gpu import ContextError
from mkdsl.models import MissingExtra, extra

__all__ = [
    "BATCHES", "Answer", "ContextError", "Delta", "Engine", "EngineError", "LogitsError", "Logprob", "PagesError", "PromptError", "SamplingError",
    "SamplingParams", "Stats", "Tokenizer", "answers", "fetch_smollm2", "load_tokenizer", "loading_bar", "main",
]  # fmt: skip


def main(*more: Callable[[], Callable[..., None]]) -> None:
    """The `mkdsl` command. Each of `more` imports and returns one more command: packages above this one have their own."""
    try:
        with extra("hf"):
            from mkdsl.engine._cli import app
        for command in more:
            app.command()(command())
    except MissingExtra as missing:
        sys.exit(f"mkdsl: {missing}")
    app()
