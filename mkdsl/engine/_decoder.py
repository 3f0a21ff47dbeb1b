"""What runs a decode step: one persistent kernel where there is a GPU, the step's plain JAX meaning elsewhere."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax

from mkdsl.gpu import jit
from mkdsl.models import DecoderConfig, decode_step


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A compiled decode step, and which of the two ways it runs: "kernel" or "reference".

    step(params, kv, token, pos) -> (next token, logits, kv) takes and returns one sequence, without a batch axis; kv is donated. pos
    is best a host integer: the kernel's step checks it against the context.
    """

    step: Callable[..., tuple[jax.Array, jax.Array, Any]]
    path: Literal["kernel", "reference"]


def default_decoder(config: DecoderConfig) -> Decoder:
    """The decoder for JAX's default backend.

    On a CPU the reference runs on the bf16 weights as they are. Measured on SmolLM2-135M at context 512: 18.0 tokens/s against 16.7 with
    a float32 copy where the CPU knows bf16, 9.1 against 12.5 where it does not; the copy takes twice the memory and prefills slower.
    """
    step = decode_step(config)
    if jax.default_backend() != "gpu":
        return Decoder(jax.jit(step, donate_argnums=1), "reference")
    return Decoder(jit(step), "kernel")
