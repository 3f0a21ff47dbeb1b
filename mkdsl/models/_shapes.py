"""The shapes of well-known models: enough to compile for one, or to run one on random weights, without its checkpoint."""

from mkdsl.models._config import DecoderConfig
from mkdsl.ops import Llama3Scaling


def _llama3(factor: float) -> Llama3Scaling:
    return Llama3Scaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def _llama(*, factor: float, **sizes: int) -> DecoderConfig:
    return DecoderConfig(
        **sizes,  # pyright: ignore[reportArgumentType] (only sizes are passed)
        kv_heads=8,
        vocab=128_256,
        eps=1e-5,
        theta=500_000.0,
        scaling=_llama3(factor),
        tied=factor == 32.0,
        max_context=131_072,
        bos=128_000,
        eos=(128_001, 128_008, 128_009),
    )


