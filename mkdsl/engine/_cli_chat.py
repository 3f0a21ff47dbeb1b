"""`mkdsl chat`: a conversation, at a terminal or line by line through a pipe. Answers go to stdout, all else to stderr."""

import contextlib
import dataclasses
import io
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

import rich.console
import typer

from mkdsl.engine import _cli_sampling as options
from mkdsl.engine._answers import Answer, Delta, LogitsError
from mkdsl.engine._chat import Conversation
from mkdsl.engine._chat_defaults import chat_defaults
from mkdsl.engine._context import positions
from mkdsl.engine._engine import Engine
from mkdsl.engine._loop import EngineError
from mkdsl.engine._progress import loading_bar
from mkdsl.engine._sampling import SamplingParams
from mkdsl.engine._say import say, stopped
from mkdsl.engine._tokenizer import PromptError, load_tokenizer
from mkdsl.gpu import ContextError
from mkdsl.models import CheckpointError, read_config

COMMANDS = "/reset forgets what was said, /system TEXT sets what the model is told before all else (without TEXT: nothing), /quit ends"
PROMPT = "> "
KEYS = "Ctrl-C stops an answer, Ctrl-D ends"
REFUSALS = (
    CheckpointError,
    ContextError,
    EngineError,
    LogitsError,
    PromptError,
    typer.BadParameter,
)  # of one message: at a terminal, all goes on


def chat(
    directory: Annotated[pathlib.Path, typer.Argument(help="A Hugging Face checkpoint with a chat template.")],
    system: Annotated[str | None, typer.Option(help="What the model is told before all else.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Stop an answer after so many tokens; else when the context is full.")] = None,
    context: options.Context = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
) -> None:
    """Talk with a model. What no option says of sampling is its generation_config.json's, or else temperature 0.7 and top-p 0.95."""
    params = options.sampling(
        chat_defaults(directory), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, seed=seed, stop=stop, max_tokens=max_tokens,
    )  # fmt: skip
    positions(read_config(directory), context)
    tokenizer = load_tokenizer(directory)
    conversation = Conversation(tokenizer, system=system)
    with loading_bar(f"loading {directory.resolve().name}") as progress:
        engine = Engine.load(directory, max_batch=1, context=context, tokenizer=tokenizer, progress=progress)
    with engine:
        Chat(engine, conversation, params).run()


class Chat:
    """Reads messages and commands until they end. At a terminal a message that cannot be answered is said to be so, and the next is read;
    in a pipe it ends all, since what follows it was written for its answer."""

    def __init__(self, engine: Engine, conversation: Conversation, params: SamplingParams) -> None:
        self._engine, self._conversation, self._params = engine, conversation, params
        self._console = rich.console.Console(stderr=True)
        self._terminal = sys.stdin.isatty()

    def run(self) -> None:
        """Until /quit, or the end of standard input."""
        if self._terminal:
            self._note(f"{COMMANDS}. {KEYS}")
        for line in self._lines():
            if line == "/quit":
                break
            try:
                self._command(line) if line.startswith("/") else self._message(line)
            except (KeyboardInterrupt, *REFUSALS) as refusal:
                if not self._terminal:
                    raise
                self._note(_why_not(refusal))

    def _lines(self) -> Iterator[str]:
        """Those that say something. At a terminal, Ctrl-C throws away what was typed."""
        if self._terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (input() edits lines with it, and keeps a history)
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8 are the tokenizer's to refuse
        while True:
            try:
                line = self._read().rstrip()
            except EOFError:
                self._end_line()
                return
            except KeyboardInterrupt:
                if not self._terminal:
                    raise
                self._end_line()
                continue
            if line.strip():
                yield line

    def _read(self) -> str:
        """The next line. input() writes its prompt to stdout, which is for answers alone where it is no terminal."""
        if not self._terminal:
            return input()
        if not sys.stdout.isatty():
            typer.echo(PROMPT, nl=False, err=True)
            return input()
        return input(PROMPT)

    def _end_line(self) -> None:
        """Of a prompt without an answer."""
        if self._terminal:
            typer.echo(err=True)

    def _command(self, line: str) -> None:
        name, _, text = line.partition(" ")
        if name == "/reset" and not text:
            self._conversation.reset()
            self._note("what was said is forgotten")
        elif name == "/system":
            self._conversation.instruct(text.strip() or None)
            self._note(
                "the model is told this before all else from now on" if text.strip() else "the model is told nothing before all else"
            )
        else:
            raise typer.BadParameter(f"there is no command {line!r}; {COMMANDS}. A message that begins with / has a space before it")

    def _message(self, message: str) -> None:
        prompt, said = self._conversation.prompt(message), []
        params = self._with_room(prompt)

        def show(delta: Delta) -> None:
            said.append(delta)
            typer.echo(delta.text, nl=False)

        try:
            (answer,), speed = say(self._console, self._engine, prompt, params, show)
            note = f"{self._why(prompt, answer)} | {speed.decode(self._engine.path)}"
        except KeyboardInterrupt:
            if not (self._terminal and said):
                raise
            note = "stopped: what is there of the answer stays in the conversation"
        finally:
            if said:
                typer.echo()
        self._conversation.add(message, "".join(delta.text for delta in said))
        used = len(prompt) + sum(len(delta.tokens) for delta in said)
        self._note(f"{note} | {used} of {self._engine.context} positions")

    def _with_room(self, prompt: Sequence[int]) -> SamplingParams:
        """How this prompt is answered: with as many tokens as were asked for, or as there is room for."""
        room = self._engine.context - len(prompt)
        if room < 1:
            raise ContextError(
                f"with this message the conversation takes {len(prompt)} tokens of a context of {self._engine.context}, and nothing is left for an "
                f"answer; the message is not sent. {self._remedy()}"
            )
        return dataclasses.replace(self._params, max_tokens=min(self._params.max_tokens or room, room))

    def _why(self, prompt: Sequence[int], answer: Answer) -> str:
        if answer.finish == "length" and len(answer.tokens) != self._params.max_tokens:
            return f"the context is full, and the answer ends here. {self._remedy()}"
        return stopped(self._engine, prompt, self._params, answer)

    def _remedy(self) -> str:
        most = self._engine.config.max_context
        longer = f", mkdsl chat --context N gives more room (this model may have up to {most} positions)"
        return "/reset forgets what was said" + (longer if self._engine.context < most else "")

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)


def _why_not(refusal: BaseException) -> str:
    if isinstance(refusal, KeyboardInterrupt):
        return "stopped before the answer began: the message is not part of the conversation"
    return refusal.format_message() if isinstance(refusal, typer.BadParameter) else str(refusal)
