"""How rotary frequencies are changed for contexts longer than those that a model was first trained with, by the names of Hugging Face's `rope_scaling`.

A scaling gets `inverse` [dims / 2], theta ** (-2 i / dims), and `length`, how many tokens a sequence has so far. Each position is rotated
once, when its token comes: with the frequencies of a sequence that ends there. Two of the scalings depend on that length; theirs are arithmetic that
NumPy and JAX understand alike, since a kernel has a table of all positions and plain JAX computes one.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from mkdsl.ops._operator import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """What all scalings have."""

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied with: transformers' `attention_scaling`."""
        return 1.0

    def scaled(self, inverse: np.ndarray, theta: float, length: Any) -> Any:
        """Frequencies [dims / 2] float64, or of lengths [n, 1] float32 [n, dims / 2]."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling(Scaling):
    """Position interpolation (Chen et al. 2023): all positions are divided by `factor`."""

    factor: float

    def scaled(self, inverse: np.ndarray, theta: float, length: Any) -> Any:
        return inverse / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling(Scaling):
    """Llama 3.1's: long waves are slowed by `factor`, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scaled(self, inverse: np.ndarray, theta: float, length: Any) -> Any:
        wavelength = 2 * math.pi / inverse
        span = self.high_freq_factor - self.low_freq_factor
        smooth = np.clip((self.original_max_position_embeddings / wavelength - self.low_freq_factor) / span, 0.0, 1.0)
        return (1 - smooth) * inverse / self.factor + smooth * inverse


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScaling(Scaling):
    """NTK-aware scaling by length, transformers' `dynamic`: past `max_position_embeddings` theta grows with the sequence.

    Position p is rotated as by transformers when it decodes token by token: with the theta of a sequence of p + 1 tokens. A prompt that is longer
    than `max_position_embeddings`, which transformers rotates all alike with the theta of its end, is so rotated differently from there.
    """

    factor: float
    max_position_embeddings: int

    def scaled(self, inverse: np.ndarray, theta: float, length: Any) -> Any:
        most = self.max_position_embeddings
        growth = (length.clip(min=most) - most) * np.float32(self.factor / most) + 1
        exponents = np.arange(len(inverse), dtype=np.float32) / np.float32(max(len(inverse) - 1, 1))
        return inverse.astype(np.float32) * growth**-exponents


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling(Scaling):
    """YaRN (Peng et al. 2023): pairs that turn fewer than `beta_slow` times in the original context are slowed by `factor`, those that turn
    more than `beta_fast` times are kept, and between them lies a ramp over the pairs. truncate: the ramp begins and ends at whole pairs.

    attention_factor: the amplitude, by default the paper's 0.1 ln(factor) + 1, or that of `mscale` over that of `mscale_all_dim` where both
    are given (DeepSeek).
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def _mscale(self, by: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * by * math.log(self.factor) + 1.0

    def scaled(self, inverse: np.ndarray, theta: float, length: Any) -> Any:
        first, last = self._turning(self.beta_fast, len(inverse), theta), self._turning(self.beta_slow, len(inverse), theta)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * len(inverse) - 1)
        slowed = np.clip((np.arange(len(inverse)) - first) / ((last - first) or 0.001), 0.0, 1.0)
        return inverse / self.factor * slowed + inverse * (1 - slowed)

    def _turning(self, turns: float, pairs: int, theta: float) -> float:
        """The pair, as a fraction, that turns so many times in the original context."""
        return pairs * math.log(self.original_max_position_embeddings / (2 * math.pi * turns)) / math.log(theta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling(Scaling):
    """LongRoPE (Ding et al. 2024), Phi-3's: each pair is slowed by a factor of its own, another one past `original_max_position_embeddings`.

    Position p is rotated as by transformers when it decodes token by token: by `short_factor` within the original context and by `long_factor`
    past it. A longer prompt, which transformers rotates all by `long_factor`, is so rotated differently at its beginning; for a context that is to
    be long throughout give `long_factor` for both.

    factor: the longest context over the original one. attention_factor: the amplitude, by default sqrt(1 + ln(factor) / ln(original context)).
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        for name in ("short_factor", "long_factor"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list, as JSON has it, cannot be hashed

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 1.0 if self.factor <= 1 else math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))

    def scaled(self, inverse: np.ndarray, theta: float, length: Any) -> Any:
        for name in ("short_factor", "long_factor"):
            count, pairs = len(getattr(self, name)), len(inverse)
            require(count == pairs, "rope", f"{name} has {count} factors for dims={2 * pairs}", f"give one for each pair, so {pairs}")
        short, long = ((inverse / np.asarray(f)).astype(np.float32) for f in (self.short_factor, self.long_factor))
        past = length > self.original_max_position_embeddings
        return past * long + (1 - past) * short  # one of them exactly
