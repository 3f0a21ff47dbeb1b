"""A decoder's shape, read from a Hugging Face config.json. What this library does not compute is refused, never ignored."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from mkdsl.models._errors import CheckpointError
from mkdsl.models._fields import Fields, read_json
from mkdsl.models._rotary import read_rotary
from mkdsl.ops import Scaling


@dataclasses.dataclass(frozen=True)
class Family:
    """What an architecture is, and what transformers takes for it where config.json says nothing."""

    qk_norm: bool
    head_dim: int | None  # None: hidden over heads
    bos: tuple[int, ...]
    eos: tuple[int, ...]


FAMILIES = {
    "LlamaForCausalLM": Family(qk_norm=False, head_dim=None, bos=(1,), eos=(2,)),
    "Qwen3ForCausalLM": Family(qk_norm=True, head_dim=128, bos=(), eos=()),
}
NULLABLE = ("head_dim", "num_key_value_heads")  # null says what absence says; of all else it is refused, as transformers does


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What fixes a decoder of the Llama or Qwen3 family: sizes, rotary embedding, which weights there are, and its end tokens."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    eps: float
    theta: float
    scaling: Scaling | None = None
    tied: bool
    qk_norm: bool = False
    max_context: int
    bos: int | None = None
    eos: tuple[int, ...] = ()


def read_config(directory: str | pathlib.Path) -> DecoderConfig:
    """Reads `config.json`, and `generation_config.json` for the end tokens where there is one.

    Args:
      directory: a Hugging Face checkpoint.

    Returns:
      The decoder's shape.

    Raises:
      CheckpointError: a file is missing or broken, or the model is none that mkdsl computes.
    """
    directory = pathlib.Path(directory)
    _refuse_adapter(directory)
    raw = read_json(directory / "config.json")
    fields = Fields(directory / "config.json", {key: v for key, v in raw.items() if v is not None or key not in NULLABLE})
    family = _family(fields)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = _head_dim(fields, family.head_dim or hidden // heads)
    theta, scaling = read_rotary(fields, head_dim)
    bos = fields.tokens("bos_token_id", family.bos)
    return DecoderConfig(
        hidden=hidden,
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=_kv_heads(fields, heads),
        head_dim=head_dim,
        intermediate=fields.integer("intermediate_size"),
        vocab=fields.integer("vocab_size"),
        eps=fields.number("rms_norm_eps", 1e-6),
        theta=theta,
        scaling=scaling,
        tied=fields.flag("tie_word_embeddings", False),
        qk_norm=family.qk_norm,
        max_context=fields.integer("max_position_embeddings"),
        bos=bos[0] if bos else None,
        eos=_end_tokens(directory, fields.tokens("eos_token_id", family.eos)),
    )


def _refuse_adapter(directory: pathlib.Path) -> None:
    """A LoRA adapter, which seldom has a config.json: without this, that would be missed."""
    path = directory / "adapter_config.json"
    if path.exists():
        base = read_json(path).get("base_model_name_or_path") or "another model"
        remedy = "merge it into that model (peft's merge_and_unload, then save_pretrained) and give the merged checkpoint"
        raise CheckpointError(f"{directory}: is a LoRA adapter of {base}, no whole model; {remedy}")


# What changes the function a checkpoint computes: key, the values mkdsl computes, and how to say so.
SUPPORTED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("hidden_act", lambda v: v in (None, "silu"), "only silu is supported"),
    ("attention_bias", lambda v: not v, "only attention without biases is supported"),
    ("mlp_bias", lambda v: not v, "only an MLP without biases is supported"),
    ("use_sliding_window", lambda v: not v, "only full attention is supported"),
    (
        "layer_types",
        lambda v: not v or (isinstance(v, list) and all(kind == "full_attention" for kind in v)),
        "only full attention is supported",
    ),
    ("partial_rotary_factor", lambda v: v in (None, 1.0), "only rotary embedding of whole heads is supported"),
    ("quantization_config", lambda v: not v, "only unquantised bf16, f16 and f32 weights are supported; take the original checkpoint"),
)


def _family(fields: Fields) -> Family:
    """The model's family; whatever else would change its function is refused."""
    named = fields.values.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else named
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise CheckpointError(f"{fields.path}: architecture {architecture} is not supported; supported are {', '.join(FAMILIES)}")
    for key, supported, remedy in SUPPORTED:
        if not supported(fields.values.get(key)):
            fields.refuse(key, remedy)
    return FAMILIES[architecture]


def _kv_heads(fields: Fields, heads: int) -> int:
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        fields.refuse("num_key_value_heads", f"it should divide num_attention_heads={heads}")
    return kv_heads


def _head_dim(fields: Fields, default: int) -> int:
    head_dim = fields.integer("head_dim", default)
    if head_dim % 2:
        raise CheckpointError(f"{fields.path}: {head_dim=} is odd; rotary embedding pairs the two halves of a head")
    return head_dim


def _end_tokens(directory: pathlib.Path, default: tuple[int, ...]) -> tuple[int, ...]:
    """generation_config.json has the last word, as in Hugging Face: chat models list the end of a turn only there."""
    path = directory / "generation_config.json"
    return Fields(path, read_json(path)).tokens("eos_token_id", default) if path.exists() else default
