"""Greedy generation: the prompt through XLA, then token by token through a decoder, never past the end of the cache."""

import dataclasses
import pathlib
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mkdsl.engine._decoder import Decoder, check_context, default_decoder
from mkdsl.engine._prefill import compile_fill, fill
from mkdsl.engine._sampler import NOT_FINITE
from mkdsl.engine._tokenizer import Tokenizer, load_tokenizer
from mkdsl.gpu import ContextError, committed, keep_executables
from mkdsl.models import CheckpointError, DecoderConfig, init_cache, load, read_config

DAMAGED = "a weight is no number, or one so large that sums overflow: download the checkpoint again"
DEFAULT_CONTEXT = 2048  # a kernel is made for one context, and its cache is allocated whole: not every model's 131072 positions unasked
TILE = 64  # positions: a kernel's context is a multiple


class LogitsError(ArithmeticError):
    """A step's logits are NaN or infinite: no token follows from them."""


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


def load_model(directory: str | pathlib.Path, *, context: int | None = None, tokenizer: Tokenizer | None = None) -> Model:
    """Loads a Hugging Face checkpoint, ready to generate. On a GPU its kernel is compiled first: what cannot run is refused before loading.

    Args:
      directory: the checkpoint.
      context: positions in the cache; by default 2048, or the whole tiles of what the model has been made for if that is less.
      tokenizer: the checkpoint's, where it has been loaded already.

    Returns:
      The model.

    Raises:
      CheckpointError: the checkpoint cannot be used.
      ContextError: the model has not been made for so long a context.
      UnsupportedError, ScheduleError: on a GPU, where no kernel takes the model's sizes or the context.
      MissingExtra: safetensors or tokenizers is not installed.
    """
    keep_executables()
    config = read_config(directory)
    context = positions(config, context)
    tokenizer = tokenizer or load_tokenizer(directory)
    decoder = default_decoder(config, context)
    config, params = load(directory)
    return Model(config=config, params=params, tokenizer=tokenizer, decoder=decoder, context=context)


def positions(config: DecoderConfig, context: int | None = None) -> int:
    """A context that is asked for, or else 2048, or the whole tiles of what the model has been made for if that is less.

    Raises:
      ContextError: the model has not been made for it.
    """
    most = min(DEFAULT_CONTEXT, config.max_context)
    context = (most - most % TILE or most) if context is None else context
    check_context(context, config.max_context)
    return context


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

    The iterator raises LogitsError where a step's logits are NaN or infinite.
    """
    check_prompt(model.config, model.context, prompt, max_tokens)
    limit = max_tokens or model.context - len(prompt)
    return Generation(_generate(model, prompt, limit, "context" if max_tokens is None else "max_tokens"))


def check_prompt(config: DecoderConfig, context: int, prompt: Sequence[int], max_tokens: int | None) -> None:
    """Raises what `generate` raises for a prompt: nothing else of the model is needed for it than its shape."""
    if max_tokens is not None and max_tokens < 1:
        raise ContextError(f"{max_tokens=}; ask for at least one")
    if not prompt:
        raise ContextError("the prompt has no tokens; give at least one")
    if max(prompt) >= config.vocab:
        raise CheckpointError(f"token {max(prompt)} lies past the vocabulary of {config.vocab}; the tokenizer is another model's")
    room = context - len(prompt)
    if room < (max_tokens or 1):
        asked = "nothing is left for an answer" if max_tokens is None else f"{max_tokens} more are asked for"
        raise ContextError(
            f"the prompt takes {len(prompt)} tokens of a context of {context}, and {asked}; {_remedy(config, context, room)}"
        )


def _remedy(config: DecoderConfig, context: int, room: int) -> str:
    fewer = "shorten the prompt" if room < 1 else f"ask for at most {room}"
    longer = f" or give a longer context (this model's may have up to {config.max_context} positions)"
    return fewer + (longer if context < config.max_context else "")


def _generate(model: Model, prompt: Sequence[int], limit: int, at_limit: Literal["max_tokens", "context"]) -> Generator[int, None, Report]:
    """The prompt's last token is not prefilled: it is decoded like those that follow, and gives the first of them."""
    kv = committed(init_cache(model.config, model.context))
    compile_fill(model.config, model.params, kv, prompt[:-1])
    start = time.perf_counter()
    kv = jax.block_until_ready(fill(model.config, model.params, kv, prompt[:-1]))
    filled = time.perf_counter()
    stopped, times = at_limit, []
    for token in map(int, _one_ahead(_steps(model, kv, prompt, limit))):
        times.append(time.perf_counter())
        if token == NOT_FINITE:
            raise LogitsError(f"the logits after {len(prompt) + len(times) - 1} tokens are NaN or infinite; {DAMAGED}")
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
        token, logits, kv = model.decoder.step(model.params, kv, token, np.int32(pos))  # pos on the host, where the kernel's check reads it
        yield _checked(token, logits)


@jax.jit
def _checked(token: jax.Array, logits: jax.Array) -> jax.Array:
    """The token, or NOT_FINITE: computed where the logits are, so that one number comes back as without the check."""
    return jnp.where(jnp.isfinite(logits).all(), token, NOT_FINITE)


def _one_ahead[T](steps: Iterator[T]) -> Iterator[T]:
    """Starts each step before the one before it is read, so that a GPU never waits for the host: one step past the end is the price."""
    current = next(steps)
    for following in steps:
        yield current
        current = following
    yield current
