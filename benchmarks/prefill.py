"""Prefill on the GPU at hand: checked against float32, then its share of the rate that the card multiplies matrices at, measured in the same run.

    python benchmarks/prefill.py llama-3.2-1b [--tokens 2048] [--context 4096] [--runs 10]

Random weights and prompts. *mk.prefill* is the compiled decode function by itself, on one cache of --tokens positions. *engine* is wall time from
a prompt sent to its first token, less that of a prompt of one token: so it has pages, the host and, where it is cut, all pieces in it. Operations
counted are those of the layers' matrices, two for each weight and token, and of causal attention, four for each pair of tokens and feature of a
head. The card's rate is that of a bfloat16 product of 8,192 x 8,192 matrices.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mkdsl as mk
from mkdsl.engine import Engine, SamplingParams, Tokenizer, load_tokenizer
from mkdsl.models import SHAPES, DecoderConfig, decode_step, init_cache, random_params


def seconds(f: Callable[[], Any], runs: int) -> float:
    """Wall clock of a call, the median; one before them compiles."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        jax.block_until_ready(f())
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def matmul_rate(size: int = 8192, times: int = 20) -> float:
    """Operations per second of bfloat16 products, one after another."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16) / size**0.5
    many = jax.jit(lambda a: jax.lax.fori_loop(0, times, lambda _, x: a @ x, a))
    return times * 2 * size**3 / seconds(lambda: many(a), 5)


def operations(config: DecoderConfig, params: Any, tokens: int) -> float:
    weights = sum(leaf.size for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim == 3)
    return 2 * tokens * weights + 4 * config.layers * config.heads * config.head_dim * tokens * (tokens + 1) / 2


def filler(config: DecoderConfig) -> Callable[..., Any]:
    """f(params, kv, tokens, positions) -> kv, the cache donated."""
    return jax.jit(lambda *args: mk.prefill(decode_step(config), ascending=True)(*args)[-1], donate_argnums=1)


def last_keys(config: DecoderConfig, params: Any, tokens: np.ndarray, dtype: Any) -> np.ndarray:
    """The last layer's keys of a prompt, all computed in so precise a type: what every layer has done shows in them."""
    params = jax.tree.map(lambda a: a.astype(dtype), params)
    kv = init_cache(config, tokens.size, dtype=dtype)
    return np.asarray(filler(config)(params, kv, tokens, np.arange(tokens.size, dtype=np.int32))["k"][-1], np.float32)


def prefill_seconds(config: DecoderConfig, params: Any, tokens: np.ndarray, runs: int) -> float:
    fill, kv = filler(config), init_cache(config, tokens.size)

    def once() -> Any:
        nonlocal kv
        kv = fill(params, kv, tokens, np.arange(tokens.size, dtype=np.int32))
        return kv

    return seconds(once, runs)


def engine_seconds(config: DecoderConfig, params: Any, tokens: int, context: int, runs: int) -> float:
    rng, first = np.random.default_rng(1), SamplingParams(temperature=0.0, max_tokens=1)
    with Engine.of(config, params, numbers(config.vocab), max_batch=1, context=context) as engine:

        def wall(length: int) -> float:
            return seconds(lambda: [len(engine.generate([rng.integers(0, config.vocab, length).tolist()], first))], runs)

        return wall(tokens + 1) - wall(1)


def numbers(vocab: int) -> Tokenizer:
    """One whose tokens are numbers: the prompts are token ids."""
    directory = pathlib.Path(tempfile.mkdtemp())
    model = {"type": "WordLevel", "vocab": {str(i): i for i in range(vocab)}, "unk_token": "0"}
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}), encoding="utf-8")
    return load_tokenizer(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prefill's share of the card's matmul rate.")
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--context", type=int, default=4096, help="of the engine; a multiple of 64")
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    config = dataclasses.replace(SHAPES[args.model], eos=())
    params = random_params(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, config.vocab, args.tokens).astype(np.int32)
    rate, needed = matmul_rate(), operations(config, params, args.tokens)
    print(
        f"{args.model}, {args.tokens} tokens: {needed / 1e12:.2f} TFLOP; {jax.devices()[0].device_kind} multiplies at {rate / 1e12:.0f} TFLOP/s"
    )
    want, found = (last_keys(config, params, tokens, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    print(f"  error of the last layer's keys against float32: {np.linalg.norm(found - want) / np.linalg.norm(want):.4f}", flush=True)
    for name, took in (
        ("mk.prefill", prefill_seconds(config, params, tokens, args.runs)),
        ("engine", engine_seconds(config, params, args.tokens, args.context, args.runs)),
    ):
        print(
            f"  {name:10} {1e3 * took:8.2f} ms  {needed / took / 1e12:6.1f} TFLOP/s  {100 * needed / took / rate:5.1f} % of the card's",
            flush=True,
        )


if __name__ == "__main__":
    main()
