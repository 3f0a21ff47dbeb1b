"""An answer said aloud: streamed to a function, in the caller's thread, and timed."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import rich.console

from mkdsl.engine._answers import Answer, Delta, LogitsError, answers
from mkdsl.engine._engine import Engine
from mkdsl.engine._sampling import SamplingParams
from mkdsl.engine._speed import Heard, Speed, Stopwatch


def say(
    console: rich.console.Console, engine: Engine, prompt: Sequence[int], params: SamplingParams, show: Callable[[Delta], None]
) -> tuple[tuple[Answer, ...], Speed]:
    """Answers a prompt.

    Args:
      console: says what is waited for until the first delta comes.
      engine: with a max_batch of 1, so that one answer ends before the next begins.
      prompt: token ids.
      params: how it is answered.
      show: gets each delta.

    Returns:
      The answers, and how fast they came.

    Raises:
      As `Engine.stream`; and KeyboardInterrupt on Ctrl-C, after which the answers are cancelled.
    """
    deltas, heard = engine.stream(prompt, params), []

    async def listen(waiting: contextlib.ExitStack, watch: Stopwatch) -> list[Delta]:
        said, asked = [], watch.now()
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                heard.append(Heard(choice=delta.choice, tokens=len(delta.tokens), seconds=watch.now() - asked))
                waiting.close()
                said.append(delta)
                show(delta)
        return said

    with contextlib.ExitStack() as waiting, Stopwatch() as watch:
        waiting.enter_context(console.status(f"prefill of {len(prompt)} tokens"))
        (several,) = answers(asyncio.run(listen(waiting, watch)))
    return several, Speed.of(len(prompt), heard)


def rehearse(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> None:
    """Has the decode step compiled that the answer to a prompt takes, by answering another one with one token.

    For JAX runs what it was given while it compiles what comes next: if that were the decode step, a prompt would seem to have been prefilled in no time.
    """
    other = (prompt[0] + 1) % engine.config.vocab  # shares no prefix
    with contextlib.suppress(LogitsError):  # the answer has the same, with the place that it has there
        engine.generate([[other]], dataclasses.replace(params, max_tokens=1, n=1))


def stopped(engine: Engine, prompt: Sequence[int], params: SamplingParams, answer: Answer) -> str:
    """Why an answer ends where it does, in words of the command line."""
    if answer.finish == "length":
        return "--max-tokens reached" if len(answer.tokens) == params.max_tokens else "the context is full: see --context"
    writer = engine.tokenizer.text_after(prompt)
    whole = writer.feed(answer.tokens) + writer.finish()  # the answer's text ends before a stop string, its tokens do not
    found = [string for string in params.stop if string in whole]
    return f"it said {found[0]!r}: see --stop" if found else "the model ended its answer"
