"""Weights of decoders: always the same numbers, drawn once and cut into arrays."""

import functools
from typing import Any

import ml_dtypes
import numpy as np

from grammar.spec import Spec


@functools.cache
def _pool(exponent: int) -> np.ndarray:
    """Normal numbers times a power of two, in bfloat16."""
    drawn = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    return (drawn * 2.0**exponent).astype(ml_dtypes.bfloat16)


class Weights:
    """Draws arrays, all of them other ones."""

    def __init__(self) -> None:
        self.at = 0

    def normal(self, *shape: int, exponent: int | None = None) -> np.ndarray:
        """[.., out, in] over about sqrt(in); vectors around 0."""
        size, small = int(np.prod(shape)), -round(np.log2(shape[-1]) / 2) if len(shape) > 1 else -2
        self.at = (self.at + 7919) % ((1 << 20) - size)
        return _pool(small if exponent is None else exponent)[self.at : self.at + size].reshape(shape)

    def layer(self, spec: Spec, *lead: int) -> dict[str, Any]:
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        matrices = {"wq": (q, spec.hidden), "wk": (kv, spec.hidden), "wv": (kv, spec.hidden), "wo": (spec.hidden, q)}
        matrices |= {"wg": (spec.width, spec.hidden), "wu": (spec.width, spec.hidden), "wd": (spec.hidden, spec.width)}
        vectors = {f"{what}_{which}": spec.hidden for which in "ab" for what in ("norm", "shift")}
        vectors |= {"norm_query": spec.head_dim, "norm_key": spec.head_dim, "shift_head": spec.head_dim}
        found: dict[str, Any] = {name: self.normal(*lead, *shape) for name, shape in matrices.items()}
        found |= {name: self.normal(*lead, n, exponent=-2) for name, n in vectors.items()}
        heads = {"bq": spec.heads, "bk": spec.kv_heads, "bv": spec.kv_heads}
        flat = {n: (count * spec.head_dim,) if spec.bias == "vector" else (count, spec.head_dim) for n, count in heads.items()}
        found |= {name: self.normal(*lead, *shape, exponent=-2) for name, shape in flat.items()}
        found["vectors"] = {str(n): self.normal(*lead, n, exponent=-2) for n in {q, kv, spec.head_dim, spec.hidden, spec.width, spec.vocab}}
        found["vectors"]["heads"] = self.normal(*lead, spec.heads, exponent=-2)
        found["layer_scale"] = self.normal(*lead, exponent=-1).astype(np.float32) + np.float32(1)
        for names in () if spec.fused == "none" else ("qkv", "gu"):
            found[f"w{names}"] = np.concatenate([found[f"w{n}"] for n in names], -2)
        found["layer_gain"] = self.normal(*lead, exponent=-1)
        return found
