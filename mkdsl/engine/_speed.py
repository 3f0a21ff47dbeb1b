"""How fast an answer came, by a clock that stands still while JAX compiles: who asks once waits for that once, and it says nothing of the next answer."""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Self

from jax import monitoring

COMPILING = "/jax/core/compile/"  # how JAX's events of tracing, lowering and compiling begin


class Stopwatch:
    """A clock in seconds, for a `with`. What JAX traces, lowers or compiles meanwhile, in any thread, takes no time of it."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []  # disjoint, in which something was compiled

    def __enter__(self) -> Self:
        monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        monitoring.unregister_event_duration_listener(self._heard)

    def now(self) -> float:
        """Seconds since some time."""
        return time.perf_counter() - sum(end - start for start, end in self._spans)

    def _heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Events come at their end; one that encloses others, as the trace of a function that calls jitted ones, comes after them."""
        if not event.startswith(COMPILING):
            return
        end = time.perf_counter()
        start = end - duration_secs
        while self._spans and self._spans[-1][1] > start:
            start = min(start, self._spans.pop()[0])
        self._spans.append((start, end))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heard:
    """One delta: the choice, how many tokens, and when it came, in seconds since the answers were asked for."""

    choice: int
    tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast the answers to one prompt came, one after the other.

    Attributes:
      prefill_tokens: of the prompt. Its last token is decoded, not prefilled.
      first_tokens: that came together as the first ones. There was a decode step at least.
      first_seconds: until then: prefill and first_tokens steps.
      decode_tokens: that came after the first ones of their answer.
      decode_seconds: in which they came.
    """

    prefill_tokens: int
    first_tokens: int
    first_seconds: float
    decode_tokens: int
    decode_seconds: float

    @classmethod
    def of(cls, prompt_tokens: int, heard: Sequence[Heard]) -> Self:
        """What the deltas of all answers tell, in the order in which they came."""
        decode_tokens, decode_seconds = 0, 0.0
        for _, group in itertools.groupby((h for h in heard if h.tokens), key=lambda h: h.choice):
            first, *later = group
            decode_tokens += sum(h.tokens for h in later)
            decode_seconds += later[-1].seconds - first.seconds if later else 0.0
        return cls(
            prefill_tokens=prompt_tokens - 1,
            first_tokens=max(heard[0].tokens, 1),
            first_seconds=heard[0].seconds,
            decode_tokens=decode_tokens,
            decode_seconds=decode_seconds,
        )

    def prefill(self) -> str:
        """Prompt tokens a second, without the decode steps that came with them, where later ones say how long they took."""
        if not self.decode_tokens:
            return _rate(
                f"prefill and {self.first_tokens} decode step{'s' * (self.first_tokens > 1)}", self.prefill_tokens, self.first_seconds
            )
        steps = self.first_tokens * self.decode_seconds / self.decode_tokens
        return _rate("prefill", self.prefill_tokens, self.first_seconds - steps)

    def decode(self, path: str) -> str:
        """Tokens a second, by the path that decoded them."""
        return _rate(f"decode ({path})", self.decode_tokens, self.decode_seconds)


def _rate(what: str, tokens: int, seconds: float) -> str:
    return f"{what}: {tokens} tokens, {tokens / seconds:.1f} tokens/s" if tokens and seconds > 0 else f"{what}: too short to time"
