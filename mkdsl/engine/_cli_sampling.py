"""The sampling options that commands share. Their ranges are those of SamplingParams, which refuses what lies outside."""

import dataclasses
from typing import Annotated, Any

import typer

from mkdsl.engine._sampling import SamplingParams

_PANEL: dict[str, Any] = {"rich_help_panel": "Sampling"}

Temperature = Annotated[float | None, typer.Option(help="0 takes the most likely token; the higher, the more is left to chance.", **_PANEL)]
TopK = Annotated[int | None, typer.Option(help="Only the k most likely tokens count.", **_PANEL)]
TopP = Annotated[float | None, typer.Option(help="Only the most likely tokens, whose probabilities sum to this, count.", **_PANEL)]
MinP = Annotated[float | None, typer.Option(help="Only tokens at least so many times as likely as the likeliest count.", **_PANEL)]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1, tokens of prompt and answer become less likely.", **_PANEL)]
PresencePenalty = Annotated[float | None, typer.Option(help="Subtracted from the logit of each token of the answer.", **_PANEL)]
FrequencyPenalty = Annotated[float | None, typer.Option(help="Subtracted as many times as the token is in the answer.", **_PANEL)]
Seed = Annotated[int | None, typer.Option(help="Equal seeds give equal answers.", show_default="another each time", **_PANEL)]
Stop = Annotated[list[str] | None, typer.Option(help="A string that ends the answer; may be given several times.", **_PANEL)]
MaxTokens = Annotated[int | None, typer.Option(help="Stop after so many tokens; else when the context is full.")]
Context = Annotated[int | None, typer.Option(min=1, help="Positions in the KV cache.", show_default="2048")]


def sampling(default: SamplingParams, *, stop: list[str] | None, **given: Any) -> SamplingParams:
    """What is given on the command line, and the default for what is not.

    Raises:
      SamplingError: a value is outside its range.
    """
    given |= {"stop": tuple(stop) if stop else None}
    return dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})
