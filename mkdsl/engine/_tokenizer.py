"""Text to tokens and back: tokenizer.json, the chat template beside it, and text streamed by whole characters."""

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from mkdsl.models import CheckpointError, extra, read_json

if TYPE_CHECKING:
    import tokenizers

UNFINISHED = "\ufffd"  # what the first bytes of a character decode to while the rest is missing
SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A model's tokenizer, its chat template if it has one, and the special tokens the template may name."""

    model: "tokenizers.Tokenizer"
    directory: pathlib.Path
    template: str | None
    specials: Mapping[str, str]

    def encode(self, text: str) -> list[int]:
        """The tokens of plain text, with the model's beginning-of-sequence token where it wants one."""
        return self.model.encode(text).ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation, up to where the assistant's answer begins.

        Args:
          messages: {"role", "content"} each, as in Hugging Face's `apply_chat_template`.

        Returns:
          Token ids.

        Raises:
          CheckpointError: the model has no chat template, or its template refuses these messages.
          MissingExtra: jinja2 is not installed.
        """
        if self.template is None:
            raise CheckpointError(f"{self.directory}: has no chat template, so this is no chat model; leave out --chat")
        text = _render(self.directory, self.template, messages=messages, add_generation_prompt=True, **self.specials)
        return self.model.encode(text, add_special_tokens=False).ids  # the template writes them itself

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text as its tokens arrive, never half a character. Special tokens show as nothing.

        A token may hold part of a character, and may decode differently after its neighbour (a leading space): so the tokens not yet
        shown are decoded after those shown last, and held back while they end in the middle of a character.
        """
        shown: list[int] = []
        waiting: list[int] = []
        for token in tokens:
            waiting.append(token)
            piece = self._after(shown, waiting)
            if piece and not piece.endswith(UNFINISHED):
                yield piece
                shown, waiting = waiting, []
        if rest := self._after(shown, waiting):
            yield rest

    def _after(self, shown: list[int], waiting: list[int]) -> str:
        return self.model.decode(shown + waiting)[len(self.model.decode(shown)) :]


def load_tokenizer(directory: str | pathlib.Path) -> Tokenizer:
    """Reads tokenizer.json, and tokenizer_config.json and chat_template.jinja where there are any.

    Args:
      directory: a Hugging Face checkpoint.

    Returns:
      The tokenizer.

    Raises:
      CheckpointError: tokenizer.json is missing or broken.
      MissingExtra: tokenizers is not installed.
    """
    with extra("hf"):
        import tokenizers
    directory = pathlib.Path(directory)
    path = directory / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(f"{path}: it is not there; download it with the model (SentencePiece's tokenizer.model is not supported)")
    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise CheckpointError(f"{path}: broken ({error}); download it again") from None
    about = directory / "tokenizer_config.json"
    options = read_json(about) if about.exists() else {}
    named = {key: options[key] for key in SPECIALS if options.get(key)}
    specials = {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}
    return Tokenizer(model=model, directory=directory, template=_template(directory, options), specials=specials)


def _template(directory: pathlib.Path, options: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or tokenizer_config.json's: one string, or several by name of which "default" is meant."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text()
    template = options.get("chat_template")
    if not isinstance(template, list):
        return template
    return {entry["name"]: entry["template"] for entry in template}.get("default")


def _render(directory: pathlib.Path, template: str, **values: Any) -> str:
    """Renders a template as Hugging Face does. It comes with the weights, from anywhere: hence the sandbox."""
    with extra("hf"):
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)  # jinja2's own escapes for HTML
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    try:
        return environment.from_string(template).render(**values)
    except jinja2.TemplateError as error:
        raise CheckpointError(f"{directory}: its chat template refuses this conversation ({error})") from None
