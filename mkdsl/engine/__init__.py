"""From a checkpoint to text: one sequence through the kernel, or many requests at once; and the command line."""

import sys
from collections.abc import Callable

from mkdsl.engine._answers import Answer, Delta, Logprob, answers
from mkdsl.engine._decoder import Decoder, default_decoder
from mkdsl.engine._engine import Engine, Stats
from mkdsl.engine._generate import Generation, LogitsError, Model, Report, generate, load_model
from mkdsl.engine._loop import EngineError
from mkdsl.engine._sampling import SamplingError, SamplingParams
from mkdsl.engine._scheduler import BATCHES, PagesError
from mkdsl.engine._smollm2 import fetch_smollm2
from mkdsl.engine._tokenizer import PromptError, Tokenizer, load_tokenizer
from mkdsl.gpu import ContextError
from mkdsl.models import MissingExtra, extra

__all__ = [
    "BATCHES", "Answer", "ContextError", "Decoder", "Delta", "Engine", "EngineError", "Generation", "LogitsError", "Logprob", "Model", "PagesError",
    "PromptError", "Report", "SamplingError", "SamplingParams", "Stats", "Tokenizer", "answers", "default_decoder", "fetch_smollm2", "generate", "load_model",
    "load_tokenizer", "main",
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
