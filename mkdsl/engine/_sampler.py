"""The next token of each sequence of a batch, chosen on the device from its logits, its own parameters and its own key.

Nothing here crosses from one sequence to another, and what a sequence does not ask for changes nothing of it, though it be computed for its
neighbour. What nobody asks for is not computed. Nothing is sorted: top-k and top-p find the logit of the last token kept bit by bit.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import lax

from mkdsl.engine._sampling import MOST_LOGPROBS, SamplingParams
from mkdsl.engine._slots import Knobs, Slots
from mkdsl.gpu import record

NOT_FINITE = -1  # no token: what stands for one whose logits are not numbers
COLDEST = 1e-6  # a lower temperature is this one: on a GPU much smaller numbers are zero


@record
@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprobs:
    """Log-probabilities of the model itself: before penalties, bias and temperature.

    Attributes:
      logprob: [b] float32, the chosen token's.
      top_tokens: [b, min(20, vocab)] int32, the most likely tokens, in this order.
      top_logprobs: theirs, float32.
    """

    logprob: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


@record
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    """A token of each sequence.

    Attributes:
      token: [b] int32; NOT_FINITE where a logit is NaN or infinity, or all are minus infinity.
      logprobs: None where no sequence asks for them.
    """

    token: jax.Array
    logprobs: Logprobs | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What some sequence of a batch asks for. It is known before a dispatch, so that the device need not ask itself whether to compute it: on a GPU each
    such question is a trip to the host and back.

    Attributes:
      changes: penalties or a bias.
      draws: a temperature above 0.
      top_k, top_p: that not all tokens count.
      logprobs: log-probabilities.
    """

    changes: bool
    draws: bool
    top_k: bool
    top_p: bool
    logprobs: bool

    @staticmethod
    def everything() -> "Asked":
        return Asked(changes=True, draws=True, top_k=True, top_p=True, logprobs=True)

    @staticmethod
    def of(several: Iterable[SamplingParams]) -> "Asked":
        several = list(several)
        drawn = [p for p in several if p.temperature > 0]
        plain = SamplingParams()
        same = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
        return Asked(
            changes=any(getattr(p, name) != getattr(plain, name) for p in several for name in same),
            draws=bool(drawn),
            top_k=any(p.top_k is not None for p in drawn),
            top_p=any(p.top_p < 1 for p in drawn),
            logprobs=any(p.logprobs is not None for p in several),
        )


def sample(logits: jax.Array, slots: Slots, rows: jax.Array, index: jax.Array, *, asked: Asked) -> Sampled:
    """Chooses a token for each sequence.

    Args:
      logits: [b, vocab] float32.
      slots: of all sequences.
      rows: [b] int32, each one's slot.
      index: [b] int32, the place of this token in each one's answer. It and the seed make the key, and nothing else does.
      asked: what the sequences ask for; or more, which changes nothing.

    Returns:
      The tokens.
    """
    knobs = jax.tree.map(lambda a: a[rows], slots.knobs)
    scores = _penalised(logits, knobs, slots, rows) if asked.changes else logits
    token = jnp.argmax(scores, axis=1).astype(jnp.int32)
    if asked.draws:
        token = jnp.where(knobs.temperature > 0, _draw(scores, knobs, index, asked), token)
    token = jnp.where(jnp.isfinite(logits.max(axis=1)), token, NOT_FINITE)
    return Sampled(token=token, logprobs=_logprobs(logits, token) if asked.logprobs else None)


def _penalised(logits: jax.Array, knobs: Knobs, slots: Slots, rows: jax.Array) -> jax.Array:
    generated, repetition = slots.generated[rows], knobs.repetition[:, None]
    said = generated > 0
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    scores = jnp.where(said | slots.in_prompt[rows], repeated, logits)
    return scores - knobs.frequency[:, None] * generated - knobs.presence[:, None] * said + slots.bias[rows]


def _draw(scores: jax.Array, knobs: Knobs, index: jax.Array, asked: Asked) -> jax.Array:
    """A token by its probability among those that count: the largest logit after Gumbel noise is just that, and needs no sum."""
    scores = (scores - scores.max(axis=1, keepdims=True)) / jnp.maximum(knobs.temperature, COLDEST)[:, None]
    scores = _only(scores >= jnp.log(knobs.min_p)[:, None], scores)
    vocab = scores.shape[1]
    if asked.top_k:
        scores = _only(_top_k(scores, knobs.top_k), scores)
    if asked.top_p:
        scores = _only(_top_p(scores, knobs.top_p), scores)

    def noise(key: jax.Array, i: jax.Array) -> jax.Array:  # "high": of 100,000 tokens the largest noise would else often be cut off
        return jax.random.gumbel(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), i), (vocab,), mode="high")

    return jnp.argmax(scores + jax.vmap(noise)(knobs.key, index), axis=1).astype(jnp.int32)


def _only(keep: jax.Array, scores: jax.Array) -> jax.Array:
    return jnp.where(keep, scores, -jnp.inf)


def _top_k(scores: jax.Array, k: jax.Array) -> jax.Array:
    return _largest(scores, jnp.ones_like(scores), k.astype(jnp.float32))


def _top_p(scores: jax.Array, p: jax.Array) -> jax.Array:
    """The sum rounds, so at p = 1 it may be reached too early or never: then all tokens count."""
    weights = jnp.exp(scores)
    return _largest(scores, weights, p * weights.sum(axis=1)) | (p >= 1)[:, None]


def _largest(scores: jax.Array, weights: jax.Array, enough: jax.Array) -> jax.Array:
    """Which scores are among the largest whose weights sum to `enough` [b], ties with the last of them included.

    The smallest score kept is found from its highest bit down, as an integer that is ordered as the numbers are: 32 sums instead of a sort.
    """
    bits = lax.bitcast_convert_type(scores, jnp.uint32)
    keys = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def narrow(i: jax.Array, least: jax.Array) -> jax.Array:
        higher = least | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(jnp.where(keys >= higher[:, None], weights, 0).sum(axis=1) >= enough, higher, least)

    return keys >= lax.fori_loop(0, 32, narrow, jnp.zeros(scores.shape[0], jnp.uint32))[:, None]


def _logprobs(logits: jax.Array, token: jax.Array) -> Logprobs:
    logprobs = jax.nn.log_softmax(logits, axis=1)
    top, tokens = lax.top_k(logprobs, min(MOST_LOGPROBS, logits.shape[1]))
    return Logprobs(logprob=jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0], top_tokens=tokens, top_logprobs=top)
