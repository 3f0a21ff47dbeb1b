"""What the engine adds to its kernel: wall time of a token beside the kernel's own, in one run.

    python benchmarks/engine.py smollm2-135m [--context 1024] [--prompt 512] [--answer 256] [--streams 1,16]

Random weights, random prompts, greedy, no end token. For each number of streams: they are all sent at once, and the time is from the first token of
the last to begin until the first to end, over the tokens of each in between. The kernel's time is CUPTI's, at the positions in the middle of the
answers, and its logits are compared with plain `jax.jit` first.
"""

import argparse
import asyncio
import dataclasses
import functools
import json
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from mkdsl.engine import Engine, SamplingParams, Tokenizer, load_tokenizer
from mkdsl.gpu import jit
from mkdsl.models import SHAPES, DecoderConfig, decode_step, init_cache, random_params


def tokenizer_of(vocab: int) -> Tokenizer:
    """One whose tokens are numbers: the benchmark's prompts are token ids."""
    directory = pathlib.Path(tempfile.mkdtemp())
    words = {str(i): i for i in range(vocab)}
    text = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": words, "unk_token": "0"}}
    (directory / "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")
    return load_tokenizer(directory)


def kernel_us(config: DecoderConfig, params: Any, context: int, batch: int, position: int) -> tuple[float, float]:
    """(the kernel's time, its error beside plain jax.jit, relative to the largest logit)."""
    kv = jax.tree.map(
        lambda a: jax.random.normal(jax.random.key(1), a.shape, jnp.float32).astype(a.dtype), init_cache(config, context, batch=batch)
    )
    args = params, kv, jnp.arange(batch, dtype=jnp.int32), jnp.full(batch, position, jnp.int32)
    step = jax.jit(jit(decode_step(config), batch=batch).lower(*args).program)
    want = jax.jit(jax.vmap(decode_step(config), (None, 0, 0, 0)))(*args)[1]
    error = float(jnp.abs(step(*args)[1] - want).max() / jnp.abs(want).max())
    runs: Any = profiler.Cupti(finalize=False).measure(step, aggregate=False, iterations=20)(*args)[1]
    return 1e3 * float(np.median([max(ms for _, ms in run) for run in runs])), error


async def _times(engine: Engine, prompt: list[int], answer: int) -> list[float]:
    """When each token of an answer came; those of one dispatch come together."""
    times = []
    async for delta in engine.stream(prompt, SamplingParams(temperature=0.0, max_tokens=answer)):
        times += [time.perf_counter()] * len(delta.tokens)
    return times


async def token_us(engine: Engine, prompts: list[list[int]], answer: int) -> float:
    """Wall time of a step while all streams run."""
    every = await asyncio.gather(*(_times(engine, prompt, answer) for prompt in prompts))
    begin, end = max(times[0] for times in every), min(times[-1] for times in every)
    counts = [sum(begin < t <= end for t in times) for times in every]
    return 1e6 * (end - begin) / (sum(counts) / len(counts))


def main() -> None:
    parser = argparse.ArgumentParser(description="Wall time of a token in the engine beside the kernel's own.")
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--context", type=int, default=1024, help="a multiple of 64")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--answer", type=int, default=256)
    parser.add_argument("--streams", default="1,16")
    args = parser.parse_args()
    config = dataclasses.replace(SHAPES[args.model], eos=())
    params, rng = random_params(config, jax.random.key(0)), np.random.default_rng(0)
    print(f"{args.model}, context {args.context}, prompts of {args.prompt}, answers of {args.answer}, {jax.devices()[0].device_kind}")
    for streams in map(int, args.streams.split(",")):
        engine = Engine.of(config, params, tokenizer_of(config.vocab), max_batch=streams, context=args.context)
        draw = functools.partial(rng.integers, 0, config.vocab, (streams, args.prompt))
        us = [asyncio.run(token_us(engine, draw().tolist(), args.answer)) for _ in range(3)]  # the first compiles
        engine.close()
        kernel, error = kernel_us(config, params, args.context, streams, args.prompt + args.answer // 2)
        print(f"{streams:>3} streams: token {us[1]:.0f} and {us[2]:.0f} us, kernel {kernel:.0f} us, error {error:.4f}", flush=True)


if __name__ == "__main__":
    main()
