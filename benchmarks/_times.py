"""An engine with random weights and random prompts: times of a token while some streams run, and of requests that arrive at random."""

import asyncio
import json
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from mkdsl.engine import Engine, SamplingParams, Tokenizer, load_tokenizer
from mkdsl.gpu import jit
from mkdsl.models import DecoderConfig, decode_step, init_cache

Alive = Callable[[], None]


def tokenizer_of(vocab: int) -> Tokenizer:
    """One whose tokens are numbers: the benchmark's prompts are token ids."""
    directory = pathlib.Path(tempfile.mkdtemp())
    words = {str(i): i for i in range(vocab)}
    text = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": words, "unk_token": "0"}}
    (directory / "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")
    return load_tokenizer(directory)


def kernel_us(config: DecoderConfig, params: Any, *, context: int, batch: int, position: int) -> tuple[float, float]:
    """(the kernel's time by CUPTI, its error beside plain jax.jit relative to the largest logit). Without a GPU, plain jax.jit's wall time."""
    kv = jax.tree.map(
        lambda a: jax.random.normal(jax.random.key(1), a.shape, jnp.float32).astype(a.dtype), init_cache(config, context, batch=batch)
    )
    args = params, kv, jnp.arange(batch, dtype=jnp.int32), jnp.full(batch, position, jnp.int32)
    plain = jax.jit(jax.vmap(decode_step(config), (None, 0, 0, 0)))
    if jax.default_backend() != "gpu":
        return _wall_us(plain, *args), 0.0
    step, want = jax.jit(jit(decode_step(config), batch=batch).lower(*args).program), plain(*args)[1]
    error = float(jnp.abs(step(*args)[1] - want).max() / jnp.abs(want).max())
    runs: Any = profiler.Cupti(finalize=False).measure(step, aggregate=False, iterations=20)(*args)[1]
    return 1e3 * float(np.median([max(ms for _, ms in run) for run in runs])), error


def _wall_us(step: Callable, *args: Any) -> float:
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        jax.block_until_ready(step(*args))
        times.append(1e6 * (time.perf_counter() - begun))
    return min(times)


async def _times(engine: Engine, prompt: list[int], answer: int, alive: Alive) -> list[float]:
    """When each token of an answer came; those of one dispatch come together."""
    times = []
    async for delta in engine.stream(prompt, SamplingParams(temperature=0.0, max_tokens=answer)):
        times += [time.perf_counter()] * len(delta.tokens)
        alive()
    if len(times) != answer:
        raise RuntimeError(f"{len(times)} tokens came of {answer}")
    return times


async def token_us(engine: Engine, prompts: list[list[int]], *, answer: int, alive: Alive) -> float:
    """Wall time of a step while all streams run: from the first token of the last to begin until the first to end."""
    every = await asyncio.gather(*(_times(engine, prompt, answer, alive) for prompt in prompts))
    begin, end = max(times[0] for times in every), min(times[-1] for times in every)
    counts = [sum(begin < t <= end for t in times) for times in every]
    if not sum(counts):
        raise RuntimeError("the streams never ran all at once; give a longer --answer")
    return 1e6 * (end - begin) / (sum(counts) / len(counts))


async def arrivals(
    engine: Engine, rng: np.random.Generator, *, rate: float, seconds: float, prompt: int, answer: int, alive: Alive
) -> dict[str, str]:
    """Requests that arrive at random, so many a second on the average, whether those before are done or not: a row of the table."""
    waiting, requests, begun = [], [], time.perf_counter()
    at = begun
    async with asyncio.TaskGroup() as group:
        while (at := at + rng.exponential(1 / rate)) < begun + seconds:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            waiting.append(engine.stats().waiting)
            tokens = rng.integers(0, engine.config.vocab, prompt).tolist()
            requests.append((at, group.create_task(_times(engine, tokens, answer, alive))))
    every = [(at, task.result()) for at, task in requests]
    if not every:
        raise RuntimeError(f"nobody came in {seconds} s at {rate:.2f} requests a second; give more seconds")
    later = [(times[-1] - times[0]) / n for _, times in every if (n := sum(t > times[0] for t in times))]
    return {
        "requests/s": f"{rate:.1f}",
        "requests": str(len(every)),
        "tokens/s": f"{len(every) * answer / (max(times[-1] for _, times in every) - begun):.0f}",
        "first token ms, p50, p99": quantiles([times[0] - at for at, times in every], 1e3),
        "token us, p50, p99": quantiles(later, 1e6, digits=0),
        "queue: mean, most, last": f"{np.mean(waiting):.1f}, {max(waiting)}, {waiting[-1]}",
    }


def quantiles(seconds: list[float], unit: float, *, digits: int = 1) -> str:
    """p50 and p99, of a unit that so many of make a second."""
    return ", ".join(f"{unit * float(np.quantile(seconds, q)):.{digits}f}" for q in (0.5, 0.99)) if seconds else "-"
