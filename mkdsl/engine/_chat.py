"""A conversation: what was said so far, and the prompt that it makes of the next message."""

from collections.abc import Mapping

from mkdsl.engine._tokenizer import Tokenizer

PROBE = "Hello"  # a message that any template takes


class Conversation:
    """Messages, through a model's chat template. The prefix of a prompt that was there the last time is in the engine's prefix cache."""

    def __init__(self, tokenizer: Tokenizer, *, system: str | None = None) -> None:
        """Begins a conversation.

        Args:
          tokenizer: has a chat template.
          system: what the model is told before all else.

        Raises:
          CheckpointError: it has none, or the template takes no such message.
          PromptError: `system` was made of bytes that are not UTF-8.
        """
        self._tokenizer = tokenizer
        self._said: list[Mapping[str, str]] = []
        self.instruct(system)

    def instruct(self, system: str | None) -> None:
        """Tells the model something else before all else, or nothing; what was said stays. Raises as above, and then nothing has changed."""
        first = [] if system is None else [_message("system", system)]
        self._tokenizer.encode_chat([*first, _message("user", PROBE)])
        self._first = first

    def reset(self) -> None:
        """Forgets what was said."""
        self._said.clear()

    def prompt(self, message: str) -> list[int]:
        """The tokens up to where the answer to this message begins.

        Raises:
          CheckpointError: the template refuses the conversation.
          PromptError: the message was made of bytes that are not UTF-8.
        """
        return self._tokenizer.encode_chat([*self._first, *self._said, _message("user", message)])

    def add(self, message: str, answer: str) -> None:
        """Both have been said."""
        self._said += [_message("user", message), _message("assistant", answer)]


def _message(role: str, content: str) -> Mapping[str, str]:
    return {"role": role, "content": content}
