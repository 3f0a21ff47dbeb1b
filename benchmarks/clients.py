"""OpenAI's own client, many at once, against a server of its interface: some want whole answers, some streams, some go away.

    mkdsl serve DIR --name tiny &
    python benchmarks/clients.py http://127.0.0.1:8000/v1 tiny --clients 64 --seconds 60

A line of JSON is printed: what was done and how often, seconds to the first token of a stream and of whole answers, tokens, and what went wrong. 1 is
returned if anything was lost: an answer that failed, or that has another number of tokens than was asked for and no end token.
"""

import argparse
import asyncio
import collections
import json
import random
import sys
import time

import openai

LEAST, MOST = 0.001, 0.2  # seconds after which some wait no longer


class Client:
    """Asks one thing after the other."""

    def __init__(self, args: argparse.Namespace, number: int) -> None:
        self.client = openai.AsyncOpenAI(base_url=args.address, api_key=args.key, max_retries=0, timeout=120)
        self.random, self.args = random.Random(f"{args.seed} {number}"), args
        self.did, self.lost, self.first, self.whole_s, self.tokens = collections.Counter(), [], [], [], 0

    async def run(self, end: float) -> None:
        kinds = [self.whole, self.stream, self.leave, self.give_up]
        while time.monotonic() < end:
            (kind,) = self.random.choices(kinds, (4, 4, 1, 1))
            try:
                self.did[await kind()] += 1
            except openai.RateLimitError:
                self.did["sent away"] += 1
                await asyncio.sleep(0.05)
            except Exception as error:  # of the transport too, in the middle of a stream
                self.lost.append(f"{kind.__name__}: {error!r}")
                await asyncio.sleep(0.05)
        await self.client.close()

    def ask(self) -> dict:
        """Every other prompt begins as one of eight."""
        beginning = random.Random(self.random.randrange(8)) if self.random.random() < 0.5 else self.random
        half = self.args.prompt // 2
        prompt = [*self._draw(beginning, half), *self._draw(self.random, self.args.prompt - half)]
        return {"model": self.args.model, "prompt": prompt, "max_tokens": self.args.answer, "temperature": self.random.choice([0, 1])}

    def _draw(self, source: random.Random, count: int) -> list[int]:
        return [source.randrange(self.args.vocab) for _ in range(count)]

    async def whole(self) -> str:
        begun = time.perf_counter()
        reply = await self.client.completions.create(**self.ask())
        self.whole_s.append(time.perf_counter() - begun)
        self.check(reply.choices[0].finish_reason, reply.usage)
        return "whole"

    async def stream(self) -> str:
        begun, first, finish, usage = time.perf_counter(), None, None, None
        async for chunk in await self.client.completions.create(**self.ask(), stream=True, stream_options={"include_usage": True}):
            first = first or time.perf_counter() - begun
            finish, usage = (chunk.choices[0].finish_reason if chunk.choices else finish), chunk.usage
        self.first.append(first)
        self.check(finish, usage)
        return "streamed"

    async def leave(self) -> str:
        """Goes away from a stream."""
        async with await self.client.completions.create(**self.ask(), stream=True) as chunks:
            left = self.random.randrange(4)
            async for _ in chunks:
                if not left:
                    break
                left -= 1
        return "left"

    async def give_up(self) -> str:
        """Waits no longer for a whole answer."""
        patience = self.random.uniform(LEAST, MOST)
        try:
            await self.client.with_options(timeout=patience).completions.create(**self.ask())
        except openai.APITimeoutError:
            return "gave up"
        return "gave up too late"

    def check(self, finish: str | None, usage: openai.types.CompletionUsage | None) -> None:
        tokens = usage.completion_tokens if usage else 0
        self.tokens += tokens
        if finish not in ("stop", "length") or (finish == "length" and tokens != self.args.answer):
            self.lost.append(f"{tokens} tokens of {self.args.answer}, {finish=}")


async def run(args: argparse.Namespace) -> dict:
    """All clients; what they did."""
    clients = [Client(args, number) for number in range(args.clients)]
    begun = time.monotonic()
    await asyncio.gather(*(client.run(begun + args.seconds) for client in clients))
    return {
        "seconds": time.monotonic() - begun,
        "did": sum((client.did for client in clients), collections.Counter()),
        "lost": [lost for client in clients for lost in client.lost],
        "tokens": sum(client.tokens for client in clients),
        "first": [s for client in clients for s in client.first],
        "whole": [s for client in clients for s in client.whole_s],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Many of OpenAI's clients at once against a server.")
    parser.add_argument("address", help="http://HOST:PORT/v1")
    parser.add_argument("model")
    parser.add_argument("--key", default="none")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--answer", type=int, default=128, help="tokens")
    parser.add_argument("--vocab", type=int, default=256, help="prompts are of tokens below this")
    parser.add_argument("--seed", type=int, default=0)
    did = asyncio.run(run(parser.parse_args()))
    print(json.dumps(did))
    sys.exit(bool(did["lost"]))


if __name__ == "__main__":
    main()
