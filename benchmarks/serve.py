"""What serving adds to the kernel: the engine's and the server's times beside the kernel's own, in one run, and whether everything is given back.

    python benchmarks/serve.py [MODEL ...] [--clients 64 --seconds 60] [--soak 600]

Random weights, random prompts, no end tokens; all is compiled before it is timed. For each model:

* the wall time of a token of one stream, and of 16 streams at once, beside the kernel's (CUPTI's, its logits compared with plain `jax.jit`);
* requests that arrive at random (Poisson), as many as ask for 70 % of the tokens that the 16 streams got, for --arrivals seconds;
* with --clients, so many of OpenAI's own clients, in processes of their own, against the HTTP server, some of whom go away;
* with --soak, requests of all kinds for so many seconds: see `_soak.py`.

Tables are printed last. 1 is returned if anything was lost or is not given back; and if nothing comes for a minute, with the stacks of all threads.
"""

import argparse
import asyncio
import dataclasses
import sys

import jax
import numpy as np
from _http import clients
from _soak import soak
from _times import arrivals, kernel_us, token_us, tokenizer_of
from _watch import Watchdog

from mkdsl.engine import Engine
from mkdsl.models import SHAPES, random_params

STREAMS = 16
MODELS = ["smollm2-135m", "qwen3-0.6b", "llama-3.2-1b"]
ROUNDS = 3  # of which the first is not counted
PORTION = 0.7  # of the tokens that all streams get: what arrivals ask for
Row = dict[str, str]


class Bench:
    """One model's measurements.

    Attributes:
      rows: of the tables, by their names.
      wrong: what was lost, or is not given back.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args, self.rng = name, args, np.random.default_rng(0)
        self.config = dataclasses.replace(SHAPES[name], eos=())
        self.params, self.us = random_params(self.config, jax.random.key(0)), {}
        self.rows: dict[str, Row] = {}
        self.wrong: list[str] = []

    def measure(self) -> None:
        """All but the kernel's own time."""
        args, tokenizer = self.args, tokenizer_of(self.config.vocab)
        asks = {"prompt": args.prompt, "answer": args.answer}
        with (
            Engine.of(self.config, self.params, tokenizer, max_batch=STREAMS, context=args.context, ahead=True) as engine,
            Watchdog() as alive,
        ):
            self.us = {streams: self._token_us(engine, streams, alive) for streams in (1, STREAMS)}
            self._note("streams", {f"{streams}: token us": f"{us:.0f}" for streams, us in self.us.items()})
            rate = PORTION * STREAMS * 1e6 / self.us[STREAMS] / args.answer
            self._note("arrivals", asyncio.run(arrivals(engine, self.rng, rate=rate, seconds=args.arrivals, alive=alive, **asks)))
            if args.clients:
                row, wrong = clients(engine, self.name, max_batch=STREAMS, count=args.clients, seconds=args.seconds, alive=alive, **asks)
                self._note("clients", row, wrong)
            if args.soak:
                self._note("soak", *asyncio.run(soak(engine, seconds=args.soak, alive=alive)))

    def kernels(self) -> None:
        """The kernel's own time beside the engine's."""
        for streams, token in self.us.items():
            at = self.args.prompt + self.args.answer // 2
            us, error = kernel_us(self.config, self.params, context=self.args.context, batch=streams, position=at)
            beside = {"more": f"{token - us:.0f}"} if streams == 1 else {"of its tokens": f"{us / token:.2f}"}
            row = {"kernel us": f"{us:.0f}"} | beside | {"error": f"{error:.4f}"}
            self._note("streams", {f"{streams}: {what}": value for what, value in row.items()})

    def _token_us(self, engine: Engine, streams: int, alive: Watchdog) -> float:
        """Of a step of so many streams."""
        prompts = [self.rng.integers(0, self.config.vocab, (streams, self.args.prompt)).tolist() for _ in range(ROUNDS)]
        return float(np.median([asyncio.run(token_us(engine, p, answer=self.args.answer, alive=alive)) for p in prompts][1:]))

    def _note(self, table: str, row: Row, wrong: list[str] | None = None) -> None:
        self.rows[table] = self.rows.get(table, {"model": self.name}) | row
        self.wrong += [f"{self.name}, {table}: {one}" for one in wrong or []]
        print(f"{self.name}, {table}: {row}", flush=True)


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times of the engine and the server beside the kernel's own.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(SHAPES)}; by default {', '.join(MODELS)}")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--answer", type=int, default=128, help="tokens")
    parser.add_argument("--arrivals", type=float, default=20, help="seconds of requests that arrive at random")
    parser.add_argument("--clients", type=int, default=0, help="of the HTTP server, for --seconds")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--soak", type=float, default=0, help="seconds of requests of all kinds")
    args = parser.parse_args()
    if unknown := [name for name in args.models if name not in SHAPES]:
        parser.error(f"there is no model {unknown[0]!r}; there are {', '.join(SHAPES)}")
    benches = [Bench(name, args) for name in args.models or MODELS]
    for bench in benches:
        bench.measure()
    for bench in benches:  # after all engines: CUPTI stays once it is there
        bench.kernels()
    kernel = "CUPTI's" if jax.default_backend() == "gpu" else "there is no GPU: plain jax.jit's"
    print(f"\n{jax.devices()[0].device_kind}; context {args.context}, prompts of {args.prompt}, answers of {args.answer}; kernel: {kernel}")
    for name in benches[0].rows:
        print(f"\n{name}\n\n{table([bench.rows[name] for bench in benches])}")
    sys.exit("\n".join(["", *(wrong for bench in benches for wrong in bench.wrong)]) if any(bench.wrong for bench in benches) else 0)


if __name__ == "__main__":
    main()
