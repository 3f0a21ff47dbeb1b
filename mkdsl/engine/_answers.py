"""Answers: what a caller gets of them, all at once or bit by bit, and how tokens become that."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Literal

from mkdsl.engine._sampler import NOT_FINITE, Logprobs
from mkdsl.engine._sampling import SamplingParams
from mkdsl.engine._text import Detokenizer, StopStrings

DAMAGED = "a weight is no number, or one so large that sums overflow: download the checkpoint again"
Finish = Literal["stop", "length"]  # an end token or stop string; max_tokens or the context


class LogitsError(ArithmeticError):
    """A step's logits are NaN or infinite: no token follows from them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprob:
    """A token's log-probability, and those of the most likely tokens in its place, the likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """What an answer has more than before.

    Attributes:
      prompt: which of the prompts it answers.
      choice: which of its n answers.
      text: may be empty, where tokens have not made a character or may begin a stop string.
      tokens: ids, without the end token. Those of a stop string are among them.
      logprobs: one for each of the tokens, where they were asked for.
      finish: why the answer ends here, if it does.
    """

    prompt: int
    choice: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    finish: Finish | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A whole answer: see `Delta`."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    finish: Finish


def answers(deltas: Iterable[Delta]) -> list[tuple[Answer, ...]]:
    """The whole answers that deltas make, for each prompt its n. All have ended."""
    every: dict[tuple[int, int], list[Delta]] = {}
    for delta in deltas:
        every.setdefault((delta.prompt, delta.choice), []).append(delta)
    by_prompt = itertools.groupby(sorted(every), key=lambda at: at[0])
    return [tuple(_joined(every[at]) for at in group) for _, group in by_prompt]


def _joined(deltas: Sequence[Delta]) -> Answer:
    assert deltas[-1].finish is not None
    return Answer(
        text="".join(delta.text for delta in deltas),
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        finish=deltas[-1].finish,
    )


class Writer:
    """Makes deltas of one answer's tokens."""

    def __init__(self, prompt: int, choice: int, params: SamplingParams, text: Detokenizer) -> None:
        self._prompt, self._choice, self._params, self._text = prompt, choice, params, text
        self._stops = StopStrings(params.stop)

    def write(self, tokens: Sequence[int], sampled: Logprobs | None, *, ended: bool, last: bool) -> tuple[Delta, int]:
        """The next delta.

        Args:
          tokens: the next ones, all of them finite.
          sampled: as they came from the device, arrays over tokens, where log-probabilities are wanted.
          ended: whether the last one is an end token, which is not shown.
          last: whether max_tokens are reached.

        Returns:
          The delta, and how many of the tokens it took: not all where a stop string comes before.
        """
        text, taken, shown = "", 0, len(tokens) - ended
        while taken < shown and not self._stops.found:
            text += self._stops.feed(self._text.feed(tokens[taken : taken + 1]))
            taken += 1
        if (ended or last) and not self._stops.found:
            text += self._stops.feed(self._text.finish())
            text += self._stops.finish()
        said = tuple(tokens[:taken])
        stopped = self._stops.found or ended
        logprobs = () if sampled is None else self._logprobs(said, sampled)
        finish = "stop" if stopped else "length" if last else None
        delta = Delta(prompt=self._prompt, choice=self._choice, text=text, tokens=said, logprobs=logprobs, finish=finish)
        return delta, taken if self._stops.found else len(tokens)

    def _logprobs(self, tokens: Sequence[int], sampled: Logprobs) -> tuple[Logprob, ...]:
        columns = zip(tokens, sampled.logprob.tolist(), sampled.top_tokens.tolist(), sampled.top_logprobs.tolist(), strict=False)
        most = self._params.logprobs or 0
        return tuple(Logprob(token=t, logprob=p, top=tuple(zip(ids[:most], of[:most], strict=True))) for t, p, ids, of in columns)


def is_broken(tokens: Sequence[int]) -> bool:
    """Whether no token followed from the logits."""
    return bool(tokens) and tokens[-1] == NOT_FINITE
