"""Greedy generation: the prompt through XLA, then token by token through a decoder, never past the end of the cache."""

import dataclasses
import pathlib
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mkdsl.engine._decoder import Decoder, default_decoder
from mkdsl.engine._prefill import compile_fill, fill
from mkdsl.engine._tokenizer import Tokenizer, load_tokenizer
from mkdsl.gpu import ContextError
from mkdsl.models import CheckpointError, DecoderConfig, init_cache, load, read_config

DEFAULT_CONTEXT = 2048  # a kernel is made for one context, and its cache is allocated whole: not every model's 131072 positions unasked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded model: `params` on the device, and a `decoder` for caches of `context` positions."""

    config: DecoderConfig
    params: Any
    tokenizer: Tokenizer
    decoder: Decoder
    context: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """How a generation went. Neither time holds a compilation; the first decode step, in which it may happen, is not counted."""

    stopped: Literal["eos", "max_tokens", "context"]
    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float


class Generation:
    """An iterator over new tokens. Once it is exhausted, `report` says how it went."""

    def __init__(self, tokens: Generator[int, None, Report]) -> None:
        self._tokens = tokens
        self.report: Report | None = None

    def __iter__(self) -> Iterator[int]:
        self.report = yield from self._tokens


def load_model(directory: str | pathlib.Path, *, context: int | None = None) -> Model:
    """Loads a Hugging Face checkpoint, ready to generate.

    Args:
      directory: the checkpoint.
      context: positions in the cache; by default 2048, or all that the model has been made for if those are fewer.

    Returns:
      The model.

    Raises:
      CheckpointError: the checkpoint cannot be used.
      ContextError: the model has not been made for so long a context.
      MissingExtra: safetensors or tokenizers is not installed.
    """
    config = read_config(directory)
    context = min(DEFAULT_CONTEXT, config.max_context) if context is None else context
    if not 0 < context <= config.max_context:
        raise ContextError(f"a context of {context} positions; this model has been made for 1 to {config.max_context}")
    tokenizer = load_tokenizer(directory)
    config, params = load(directory)
    return Model(config=config, params=params, tokenizer=tokenizer, decoder=default_decoder(config), context=context)


def generate(model: Model, prompt: Sequence[int], *, max_tokens: int | None = None) -> Generation:
    """Continues a prompt greedily.

    Args:
      model: a loaded model.
      prompt: token ids, from the model's tokenizer.
      max_tokens: how many to generate at most; None for as many as the context holds.

    Returns:
      An iterator over the new tokens, without the end token: `model.tokenizer.stream` makes text of it.

    Raises:
      ContextError: the prompt is empty, or it and max_tokens exceed the context. Raised here, before anything is computed.
      CheckpointError: a token lies past the model's vocabulary.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ContextError(f"{max_tokens=}; ask for at least one")
    room = _room(model, len(prompt), max_tokens)
    if max(prompt) >= model.config.vocab:
        raise CheckpointError(f"token {max(prompt)} lies past the vocabulary of {model.config.vocab}; the tokenizer is another model's")
    return Generation(_generate(model, prompt, max_tokens or room, "context" if max_tokens is None else "max_tokens"))


def _room(model: Model, prompt: int, max_tokens: int | None) -> int:
    """How many tokens fit after the prompt, if those asked for do."""
    if not prompt:
        raise ContextError("the prompt has no tokens; give at least one")
    room = model.context - prompt
    if room >= (max_tokens or 1):
        return room
    asked = "nothing is left for an answer" if max_tokens is None else f"{max_tokens} more are asked for"
    remedies = ["shorten the prompt"] if room < 1 else [f"ask for at most {room}"]
    if model.context < model.config.max_context:
        remedies.append(f"give a longer context (this model's may have up to {model.config.max_context} positions)")
    raise ContextError(f"the prompt takes {prompt} tokens of a context of {model.context}, and {asked}; {' or '.join(remedies)}")


def _generate(model: Model, prompt: Sequence[int], limit: int, at_limit: Literal["max_tokens", "context"]) -> Generator[int, None, Report]:
    """The prompt's last token is not prefilled: it is decoded like those that follow, and gives the first of them."""
    kv = init_cache(model.config, model.context)
    compile_fill(model.config, model.params, kv, prompt[:-1])
    start = time.perf_counter()
    kv = jax.block_until_ready(fill(model.config, model.params, kv, prompt[:-1]))
    filled = time.perf_counter()
    stopped, times = at_limit, []
    for token in map(int, _one_ahead(_steps(model, kv, prompt, limit))):
        times.append(time.perf_counter())
        if token in model.config.eos:
            stopped = "eos"
            break
        yield token
    return Report(
        stopped=stopped,
        prefill_tokens=len(prompt) - 1,
        prefill_seconds=filled - start,
        decode_tokens=len(times) - 1,
        decode_seconds=times[-1] - times[0],
    )


def _steps(model: Model, kv: Any, prompt: Sequence[int], limit: int) -> Iterator[jax.Array]:
    token = jnp.int32(prompt[-1])
    for pos in range(len(prompt) - 1, len(prompt) - 1 + limit):
        token, _, kv = model.decoder.step(model.params, kv, token, np.int32(pos))  # on the host, where the kernel's context check reads it
        yield token


def _one_ahead[T](steps: Iterator[T]) -> Iterator[T]:
    """Starts each step before the one before it is read, so that a GPU never waits for the host: one step past the end is the price."""
    current = next(steps)
    for following in steps:
        yield current
        current = following
    yield current
