"""How tokens are chosen, as a request says it. Checked here, on the host: what reaches the device is right."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

MOST_LOGPROBS = 20  # alternatives a token may come with: as many as OpenAI's interface knows
SEEDS = 1 << 64
LARGEST = 1e6  # a temperature, penalty or bias at most: float32 holds a logit beside it


class SamplingError(ValueError):
    """A sampling parameter has a value that means nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request's tokens are chosen, and when they end. The order in which these apply stands in docs/engine.md.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token, and top_k, top_p, min_p and seed say nothing then.
      top_k: only the k most likely tokens count, and those as likely as the last of them; None for all.
      top_p: only the most likely tokens whose probabilities sum to top_p count, and those as likely as the last of them.
      min_p: only tokens at least min_p times as likely as the likeliest count.
      repetition_penalty: logits of tokens in the prompt or the answer are divided by it where positive, multiplied where negative.
      presence_penalty: subtracted from the logit of every token in the answer.
      frequency_penalty: subtracted from a token's logit as many times as it is in the answer.
      logit_bias: added to the logits of these tokens.
      seed: equal seeds give equal answers; None for another one each time. Of n answers, number i has seed + i.
      max_tokens: the answer's length at most; None for as many tokens as the context holds.
      stop: strings that end the answer, which holds none of them.
      stop_tokens: tokens that end the answer, beside the model's own end tokens.
      logprobs: None, or with how many alternatives each token's log-probability is given. These are the model's own, before all of the above.
      n: how many answers.

    Raises:
      SamplingError: a value is outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        for name, (allowed, range_) in RANGES.items():
            value = getattr(self, name)
            if not allowed(value):
                raise SamplingError(f"{name}={value!r}; it is {range_}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _integer(value: Any, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _several(value: Any, allowed: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple | list) and all(map(allowed, value))


RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda v: _number(v) and v >= 0, "0, which takes the most likely token, or a positive number up to 1e6"),
    "top_k": (lambda v: v is None or _integer(v, 1), "None, or an integer of at least 1"),
    "top_p": (lambda v: _number(v) and 0 < v <= 1, "more than 0 and at most 1"),
    "min_p": (lambda v: _number(v) and 0 <= v <= 1, "between 0 and 1"),
    "repetition_penalty": (lambda v: _number(v) and v >= 1 / LARGEST, "a number from 1e-6 to 1e6, 1 for no penalty"),
    "presence_penalty": (_number, "a number from -1e6 to 1e6, 0 for no penalty"),
    "frequency_penalty": (_number, "a number from -1e6 to 1e6, 0 for no penalty"),
    "logit_bias": (
        lambda v: isinstance(v, Mapping) and all(_integer(token, 0) and _number(bias) for token, bias in v.items()),
        "a mapping of token ids to numbers from -1e6 to 1e6",
    ),
    "seed": (lambda v: v is None or _integer(v, 0, SEEDS - 1), "None, or an integer from 0 to 2**64 - 1"),
    "max_tokens": (lambda v: v is None or _integer(v, 1), "None, or an integer of at least 1"),
    "stop": (lambda v: _several(v, lambda s: isinstance(s, str) and s != ""), "a tuple of strings, none of them empty"),
    "stop_tokens": (lambda v: _several(v, lambda t: _integer(t, 0)), "a tuple of token ids"),
    "logprobs": (lambda v: v is None or _integer(v, 0, MOST_LOGPROBS), f"None, or an integer from 0 to {MOST_LOGPROBS}"),
    "n": (lambda v: _integer(v, 1), "an integer of at least 1"),
}
