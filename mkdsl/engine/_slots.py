"""What the device knows of each sequence besides its cache: where it stands, how its tokens are chosen, which it has seen, which end it.

A sequence has one slot from when it is admitted until it ends, so these arrays have one row for each slot and never move. Since all that a decode
step needs lies here, steps follow one another without the host's knowing what was said.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mkdsl.engine._sampling import SEEDS, SamplingParams
from mkdsl.gpu import record

TINY = float(np.finfo(np.float32).tiny)  # a smaller top_p is this one


@record
@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs:
    """The numbers of `SamplingParams`, as arrays over slots; key [slots, 2] uint32 is the seed, and thereby a threefry key."""

    key: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array


@record
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Where sequences stand, int32 each.

    Attributes:
      token: the next one to feed.
      position: where it goes.
      index: how many tokens the answer has.
      left: how many it may have yet; none of an answer that has ended.
    """

    token: jax.Array
    position: jax.Array
    index: jax.Array
    left: jax.Array


@record
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """The rows of all slots.

    Attributes:
      state: arrays of [slots].
      knobs: arrays of [slots].
      in_prompt: [slots, vocab] bool, the tokens of the prompt.
      generated: [slots, vocab] int32, how often each token is in the answer.
      bias: [slots, vocab] float32, added to the logits.
      ends: [slots, vocab] bool, the tokens that end the answer.
    """

    state: State
    knobs: Knobs
    in_prompt: jax.Array
    generated: jax.Array
    bias: jax.Array
    ends: jax.Array


def empty_slots(count: int, vocab: int) -> Slots:
    """Slots of no sequence."""
    knobs = jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype), _knobs(SamplingParams(), 0, vocab))
    in_prompt, ends = jnp.zeros((count, vocab), bool), jnp.zeros((count, vocab), bool)  # two arrays: each is donated
    generated, bias = jnp.zeros((count, vocab), jnp.int32), jnp.zeros((count, vocab), jnp.float32)
    state = State(**{field.name: jnp.zeros(count, jnp.int32) for field in dataclasses.fields(State)})
    return Slots(state=state, knobs=knobs, in_prompt=in_prompt, generated=generated, bias=bias, ends=ends)


def occupy(
    slots: Slots, row: int, *, params: SamplingParams, seed: int, prompt: Sequence[int], ends: Iterable[int], max_tokens: int
) -> Slots:
    """The slots with a new sequence in one of them, whose prompt is written but for its last token.

    Args:
      slots: all slots, donated.
      row: which of them.
      params: how tokens are chosen.
      seed: instead of `params.seed`, which may be None.
      prompt: token ids, those of the answer not among them.
      ends: all token ids that end the answer.
      max_tokens: of the answer.

    Returns:
      The slots.
    """
    state = {"token": prompt[-1], "position": len(prompt) - 1, "index": 0, "left": max_tokens}
    vocab = slots.bias.shape[1]
    marks = (_padded(tuple(tokens), np.int32, vocab) for tokens in (prompt, ends, params.logit_bias))
    bias = _padded(tuple(params.logit_bias.values()), np.float32, 0)
    return _occupy(slots, np.int32(row), State(**jax.tree.map(np.int32, state)), _knobs(params, seed, vocab), *marks, bias)


def count(generated: jax.Array, rows: jax.Array, tokens: jax.Array) -> jax.Array:
    """How often each slot has said each token, after each of these rows [b] has said one of these [b]; a row past the slots counts nothing."""
    return generated.at[rows, tokens].add(1, mode="drop")


def _knobs(params: SamplingParams, seed: int, vocab: int) -> Knobs:
    """One slot's."""
    seed %= SEEDS
    values: dict[str, Any] = {
        "key": np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32),
        "temperature": np.float32(params.temperature),
        "top_k": np.int32(min(params.top_k or vocab, vocab)),
        "top_p": np.float32(max(params.top_p, TINY)),
        "min_p": np.float32(params.min_p),
        "repetition": np.float32(params.repetition_penalty),
        "presence": np.float32(params.presence_penalty),
        "frequency": np.float32(params.frequency_penalty),
    }
    return Knobs(**values)


def _padded(values: tuple, dtype: type, fill: int) -> np.ndarray:
    """To a power of two, so that few lengths are ever compiled."""
    return np.array(values + (fill,) * ((1 << max(len(values) - 1, 0).bit_length()) - len(values)), dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _occupy(
    slots: Slots, row: jax.Array, state: State, knobs: Knobs, prompt: jax.Array, ends: jax.Array, at: jax.Array, bias: jax.Array
) -> Slots:
    """Pads are tokens past the vocabulary, which set nothing."""

    def marked(tokens: jax.Array) -> jax.Array:
        return jnp.zeros(slots.bias.shape[1], bool).at[tokens].set(True, mode="drop")

    new = Slots(
        state=state,
        knobs=knobs,
        in_prompt=marked(prompt),
        generated=jnp.zeros_like(slots.generated[0]),
        bias=jnp.zeros_like(slots.bias[0]).at[at].set(bias, mode="drop"),
        ends=marked(ends),
    )
    return jax.tree.map(lambda rows, one: rows.at[row].set(one), slots, new)
