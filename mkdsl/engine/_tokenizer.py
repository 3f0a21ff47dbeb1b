"""Text to tokens and back, as transformers has it for the same directory; and text streamed by whole characters."""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mkdsl.engine._text import Detokenizer
from mkdsl.models import CheckpointError, extra, read_json, read_text

if TYPE_CHECKING:
    import tokenizers


class PromptError(ValueError):
    """A prompt is neither text nor token ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A model's tokenizer, its chat template if it has one, and the special tokens the template may name."""

    model: "tokenizers.Tokenizer"
    directory: pathlib.Path
    template: str | None
    specials: Mapping[str, str]

    def encode(self, text: str) -> list[int]:
        """The tokens of plain text, with the model's beginning-of-sequence token where it wants one.

        Raises:
          PromptError: the text was made of bytes that are not UTF-8.
        """
        return self._ids(text, special=True)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation, up to where the assistant's answer begins.

        Args:
          messages: {"role", "content"} each, as in Hugging Face's `apply_chat_template`.

        Returns:
          Token ids.

        Raises:
          CheckpointError: the model has no chat template, or its template refuses these messages or fails on them.
          PromptError: a message was made of bytes that are not UTF-8.
          MissingExtra: jinja2 is not installed.
        """
        if self.template is None:
            raise CheckpointError(
                f"{self.directory}: has no chat template, so this is no chat model; give it plain text: mkdsl generate without --chat, or /v1/completions"
            )
        with extra("hf"):
            from mkdsl.engine._chat_template import render
        about = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        return self._ids(render(self.directory, self.template, about | dict(self.specials)), special=False)  # it writes them itself

    def _ids(self, text: str, *, special: bool) -> list[int]:
        if foreign := [c for c in text if "\ud800" <= c <= "\udfff"]:  # how Python keeps bytes of a command line that are not UTF-8
            raise PromptError(f"the prompt has {foreign[0]!r}, which is no character: it is not UTF-8; give it as UTF-8 text")
        return self.model.encode(text, add_special_tokens=special).ids

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text as its tokens arrive, never half a character. Special tokens show as nothing."""
        text = Detokenizer(self.model.decode)
        yield from filter(None, (text.feed([token]) for token in tokens))
        if rest := text.finish():
            yield rest

    def text_after(self, prompt: Sequence[int]) -> Detokenizer:
        """The text of an answer, as its tokens arrive: what prompt and answer together have beyond the prompt."""
        return Detokenizer(self.model.decode, after=prompt)


def load_tokenizer(directory: str | pathlib.Path) -> Tokenizer:
    """Reads tokenizer.json, the tokens that other files add to it, and the chat template where there is one.

    Args:
      directory: a Hugging Face checkpoint.

    Returns:
      The tokenizer. It neither cuts nor pads, whatever tokenizer.json was saved with: transformers does neither unless it is asked to.

    Raises:
      CheckpointError: tokenizer.json is missing or broken, or the tokens beside it are.
      MissingExtra: tokenizers is not installed.
    """
    with extra("hf"):
        from mkdsl.engine._added_tokens import add_tokens, read_options
        from mkdsl.engine._llama_tokenizer import is_llama_tokenizer, with_llama_spaces
    directory = pathlib.Path(directory)
    model, options = _read(directory / "tokenizer.json"), read_options(directory)
    model.no_truncation()
    model.no_padding()
    if is_llama_tokenizer(directory, options):
        options = with_llama_spaces(model, options)
    model.encode_special_tokens = bool(options.get("split_special_tokens"))
    specials = add_tokens(model, directory, options)
    return Tokenizer(model=model, directory=directory, template=_template(directory, options), specials=specials)


def _read(path: pathlib.Path) -> "tokenizers.Tokenizer":
    import tokenizers

    if not path.exists():
        raise CheckpointError(f"{path}: it is not there; download it with the model (SentencePiece's tokenizer.model is not supported)")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise CheckpointError(f"{path}: broken ({error}); download it again") from None


def _template(directory: pathlib.Path, options: Mapping[str, Any]) -> str | None:
    """chat_template.jinja's, tokenizer_config.json's or chat_template.json's, in this order; of several by name the one named "default"."""
    path, old = directory / "chat_template.jinja", directory / "chat_template.json"
    if path.exists():
        return read_text(path)
    template = options.get("chat_template")
    if template is None and old.exists():
        template = read_json(old).get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    return template.get("default") if isinstance(template, dict) else template
