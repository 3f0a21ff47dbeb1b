"""Random requests of all kinds at an engine, for some time: does everybody get what was asked for, and is everything given back?"""

import asyncio
import collections
import contextlib
import gc
import random
import time
from collections.abc import Callable

from _watch import Memory, given_back, idle, left

from mkdsl.engine import Engine, SamplingParams

CALLERS = 40  # at once: more than there are slots


def params(draw: random.Random, max_tokens: int, vocab: int) -> SamplingParams:
    """Greedy, drawn from all tokens, or with everything there is. Other combinations would be compiled one by one as they come."""
    kind = draw.choice(["greedy", "plain", "everything"])
    if kind != "everything":
        return SamplingParams(temperature=float(kind == "plain"), max_tokens=max_tokens)
    return SamplingParams(
        temperature=draw.uniform(0.1, 2), top_k=draw.randint(1, vocab), top_p=draw.uniform(0.1, 0.99), min_p=draw.choice([0.0, 0.05]),
        repetition_penalty=draw.uniform(0.8, 1.2), presence_penalty=draw.uniform(-1, 1), frequency_penalty=draw.uniform(-1, 1),
        logit_bias={draw.randrange(vocab): draw.uniform(-5, 5)}, seed=draw.getrandbits(64), stop_tokens=(draw.randrange(vocab),),
        max_tokens=max_tokens, logprobs=draw.choice([0, 5]),
    )  # fmt: skip


class Caller:
    """Asks one thing after the other, of random lengths; goes away from some, and shares the beginning of some prompts with the others."""

    def __init__(self, engine: Engine, number: int, alive: Callable[[], None]) -> None:
        self.engine, self.random, self.alive, self.did = engine, random.Random(number), alive, collections.Counter()

    async def run(self, end: float) -> collections.Counter:
        while time.monotonic() < end:
            await self.ask()
        return self.did

    async def ask(self) -> None:
        prompt = self.prompt(self.random.randint(1, self.engine.context * 3 // 4))
        asked = params(self.random, self.random.randint(1, self.engine.context - len(prompt)), self.engine.config.vocab)
        leave = self.random.choice([None, None, None, self.random.randrange(20)])  # after so many deltas
        patience = self.random.choice([None] * 7 + [self.random.uniform(0, 0.2)])
        tokens, finish, deltas = [], None, 0
        async with contextlib.AsyncExitStack() as stack:
            stream = await stack.enter_async_context(contextlib.aclosing(self.engine.stream(prompt, asked)))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    async for delta in stream:
                        self.alive()
                        tokens, finish, deltas = [*tokens, *delta.tokens], delta.finish, deltas + 1
                        if deltas == leave:
                            break
        self.did.update({"tokens": len(tokens), "complete" if finish else "cancelled": 1})
        self.check(asked, tokens, finish)

    def prompt(self, length: int) -> list[int]:
        """Two of three begin as one of four."""
        vocab, shared = self.engine.config.vocab, random.Random(self.random.randrange(4))
        begin = [shared.randrange(vocab) for _ in range(self.random.choice([0, length // 2, length]))]
        return [*begin, *(self.random.randrange(vocab) for _ in range(length - len(begin)))]

    def check(self, asked: SamplingParams, tokens: list[int], finish: str | None) -> None:
        """A complete answer is as long as asked for, or ends with an end token."""
        most = asked.max_tokens or 0
        if len(tokens) > most or (finish == "length" and len(tokens) != most) or (finish == "stop" and not asked.stop_tokens):
            self.did["wrong"] += 1
        if any(not 0 <= token < self.engine.config.vocab for token in tokens):
            self.did["wrong"] += 1


async def warm_up(engine: Engine, alive: Callable[[], None]) -> None:
    """Compiles all that the soak needs: prompts of all lengths, and then every batch with everything that can be asked for."""

    async def answer(prompt: list[int], asked: SamplingParams) -> None:
        async for _ in engine.stream(prompt, asked):
            alive()

    draw = random.Random(0)
    everything = next(p for p in iter(lambda: params(draw, 32, engine.config.vocab), None) if p.logprobs is not None)
    for n in range((engine.context // 2).bit_length()):
        await answer([0] * (1 << n), SamplingParams(max_tokens=1))
    await asyncio.gather(*(answer([n] * 8, everything) for n in range(16)))


async def soak(engine: Engine, *, seconds: float, alive: Callable[[], None]) -> tuple[dict[str, str], list[str]]:
    """A row of the table, and what is wrong."""
    await warm_up(engine, alive)
    gc.collect()
    memory, end = Memory(), time.monotonic() + seconds
    callers = [asyncio.create_task(Caller(engine, number, alive).run(end)) for number in range(CALLERS)]
    while not all(caller.done() for caller in callers):
        await asyncio.sleep(min(1.0, seconds / 10))
        memory.look()
    did = sum([caller.result() for caller in callers], collections.Counter())
    await asyncio.to_thread(idle, engine)
    wrong = [f"{did['wrong']} answers are wrong"] if did["wrong"] else []
    row = (
        {"seconds": f"{seconds:.0f}"} | {what: str(did[what]) for what in ("complete", "cancelled", "tokens")} | given_back(engine, memory)
    )
    return row, wrong + left(engine, memory)
