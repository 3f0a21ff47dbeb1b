"""The shapes of well-known models: enough to compile for one, or to run one on random weights, without its checkpoint."""

from dataclasses import replace

from mkdsl.models._config import DecoderConfig
from mkdsl.ops import Llama3Scaling

_LLAMA_8B = DecoderConfig(
    hidden=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=14336,
    vocab=128_256,
    eps=1e-5,
    theta=500_000.0,
    scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    tied=False,
    max_context=131_072,
    bos=128_000,
    eos=(128_001, 128_008, 128_009),
)
_LLAMA_1B = replace(
    _LLAMA_8B,
    hidden=2048,
    layers=16,
    head_dim=64,
    intermediate=8192,
    scaling=Llama3Scaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    tied=True,
)
_QWEN_8B = DecoderConfig(
    hidden=4096,
    layers=36,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=12288,
    vocab=151_936,
    eps=1e-6,
    theta=1_000_000.0,
    tied=False,
    qk_norm=True,
    max_context=40_960,
    bos=151_643,
    eos=(151_645, 151_643),
)
_SMOLLM2_135M = DecoderConfig(
    hidden=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    intermediate=1536,
    vocab=49_152,
    eps=1e-5,
    theta=100_000.0,
    tied=True,
    max_context=8192,
    bos=1,
    eos=(2,),
)

SHAPES: dict[str, DecoderConfig] = {
    "llama-3.2-1b": _LLAMA_1B,
    "llama-3.1-8b": _LLAMA_8B,
    "qwen3-0.6b": replace(_QWEN_8B, hidden=1024, layers=28, heads=16, intermediate=3072, tied=True),
    "qwen3-1.7b": replace(_QWEN_8B, hidden=2048, layers=28, heads=16, intermediate=6144, tied=True),
    "qwen3-8b": _QWEN_8B,
    "smollm2-135m": _SMOLLM2_135M,
}
