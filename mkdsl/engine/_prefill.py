"""The prompt, through XLA: its keys and values written into the cache, some hundreds of tokens at a time."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mkdsl.gpu import kept
from mkdsl.models import DecoderConfig, decode_step
from mkdsl.ops import prefill

SMALLEST, LARGEST = 16, 512  # tokens at a time: powers of two between these, each compiled once


@functools.cache
def filler(config: DecoderConfig) -> Any:
    """A jitted f(params, kv, tokens [n], positions [n]) -> kv, with kv donated.

    Only the cache is asked for, so XLA drops the logits, which for every token of a prompt would be the largest arrays of all.
    """

    def fill_piece(params: Any, kv: Any, tokens: jax.Array, positions: jax.Array) -> Any:
        return prefill(decode_step(config))(params, kv, tokens, positions)[-1]

    return jax.jit(kept(fill_piece, of=("prefill", config)), donate_argnums=1)


def pieces(tokens: Sequence[int], context: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts a prompt into pieces whose lengths are powers of two, so that few are ever compiled.

    Args:
      tokens: the prompt.
      context: positions in the cache.

    Yields:
      tokens [n] and positions [n], int32. Pads lie past the cache, where nothing is written.
    """
    for start in range(0, len(tokens), LARGEST):
        piece = tokens[start : start + LARGEST]
        padding = (0, max(SMALLEST, 1 << (len(piece) - 1).bit_length()) - len(piece))
        positions = np.arange(start, start + len(piece), dtype=np.int32)
        yield np.pad(np.asarray(piece, np.int32), padding), np.pad(positions, padding, constant_values=context)


def fill(config: DecoderConfig, params: Any, kv: Any, tokens: Sequence[int]) -> Any:
    """Fills an empty cache with a prompt.

    Args:
      config: the model's shape.
      params: its parameters.
      kv: an empty cache, donated.
      tokens: the prompt, no longer than the cache.

    Returns:
      The cache.
    """
    for piece, positions in pieces(tokens, kv["k"].shape[2]):
        kv = filler(config)(params, kv, piece, positions)
    return kv


def compile_fill(config: DecoderConfig, params: Any, kv: Any, tokens: Sequence[int]) -> None:
    """Compiles what `fill` with the same arguments will run, so that it can be timed: `jax.jit` finds the executables again."""
    for piece in {len(piece): (piece, positions) for piece, positions in pieces(tokens, kv["k"].shape[2])}.values():
        filler(config).lower(params, kv, *piece).compile()
