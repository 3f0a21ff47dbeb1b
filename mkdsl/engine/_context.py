"""What a context holds: how long one is, and the prompts that it has room for."""

from collections.abc import Sequence

from mkdsl.engine._decoder import check_context
from mkdsl.engine._tokenizer import PromptError
from mkdsl.gpu import ContextError
from mkdsl.models import CheckpointError, DecoderConfig

DEFAULT_CONTEXT = 2048  # a kernel is made for one context, and its cache is allocated whole: not every model's 131072 positions unasked
TILE = 64  # positions: a kernel's context is a multiple


def positions(config: DecoderConfig, context: int | None = None) -> int:
    """A context that is asked for, or else 2048, or the whole tiles of what the model has been made for if that is less.

    Raises:
      ContextError: the model has not been made for it.
    """
    most = min(DEFAULT_CONTEXT, config.max_context)
    context = (most - most % TILE or most) if context is None else context
    check_context(context, config.max_context)
    return context


def check_prompt(config: DecoderConfig, context: int, prompt: Sequence[int], max_tokens: int | None) -> None:
    """Refuses a prompt that a context has no room for. Nothing else of the model is needed for it than its shape.

    Raises:
      PromptError: the prompt is empty.
      ContextError: it and max_tokens exceed the context.
      CheckpointError: a token lies past the model's vocabulary.
    """
    if not prompt:
        raise PromptError("the prompt has no tokens; give at least one")
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
