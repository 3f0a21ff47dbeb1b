"""A decoder's shape, read from a Hugging Face config.json. What this library does not compute is refused, never ignored."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from mkdsl.models._errors import CheckpointError
from mkdsl.ops import Llama3Scaling

QK_NORM = {"LlamaForCausalLM": False, "Qwen3ForCausalLM": True}
SCALING_KEYS = tuple(f.name for f in dataclasses.fields(Llama3Scaling))
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *SCALING_KEYS}


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
    scaling: Llama3Scaling | None = None
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
    path = pathlib.Path(directory) / "config.json"
    raw = read_json(path)
    _refuse_unsupported(path, raw)
    size = functools.partial(_positive, path, raw)
    hidden, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = size("num_key_value_heads", heads)
    qk_norm = QK_NORM[raw["architectures"][0]]
    head_dim = size("head_dim", 128 if qk_norm else hidden // heads)  # Hugging Face's defaults
    theta, scaling = _rope(path, raw)
    _require(
        heads % kv_heads == 0, path, f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}", "fix one of them"
    )
    _require(head_dim % 2 == 0, path, f"{head_dim=} is odd", "rotary embedding pairs the two halves of a head")
    return DecoderConfig(
        hidden=hidden,
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=size("intermediate_size"),
        vocab=size("vocab_size"),
        eps=float(raw.get("rms_norm_eps", 1e-6)),
        theta=theta,
        scaling=scaling,
        tied=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=qk_norm,
        max_context=size("max_position_embeddings"),
        bos=raw.get("bos_token_id"),
        eos=_end_tokens(path.parent, raw),
    )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      CheckpointError: there is no such file, or it holds no JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        beside = "there is no such directory" if not path.parent.is_dir() else "it is not there"
        raise CheckpointError(f"{path}: {beside}; give the directory of a Hugging Face checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); download it again") from None
    _require(isinstance(value, dict), path, f"holds a {type(value).__name__}", "it should hold a JSON object; download it again")
    return value


def _require(condition: bool, path: pathlib.Path, problem: str, remedy: str) -> None:
    if not condition:
        raise CheckpointError(f"{path}: {problem}; {remedy}")


def _positive(path: pathlib.Path, raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if raw.get(key) is None else raw[key]
    _require(value is not None, path, f"has no {key}", "it should, as Hugging Face writes it; download it again")
    _require(type(value) is int and value > 0, path, f"{key}={value!r}", "it should be a positive integer")
    return int(value)  # pyright: ignore[reportArgumentType] (both refused above)


# What changes the function a checkpoint computes: key, the values mkdsl computes, and how to say so.
SUPPORTED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("hidden_act", lambda v: v in (None, "silu"), "only silu is supported"),
    ("attention_bias", lambda v: not v, "only attention without biases is supported"),
    ("mlp_bias", lambda v: not v, "only an MLP without biases is supported"),
    ("use_sliding_window", lambda v: not v, "only full attention is supported"),
    ("layer_types", lambda v: not v or set(v) == {"full_attention"}, "only full_attention in every layer is supported"),
    ("partial_rotary_factor", lambda v: v in (None, 1.0), "only rotary embedding of whole heads is supported"),
    ("quantization_config", lambda v: not v, "only unquantised bf16, f16 and f32 weights are supported; take the original checkpoint"),
)


def _refuse_unsupported(path: pathlib.Path, raw: Mapping[str, Any]) -> None:
    architectures = raw.get("architectures") or [None]
    _require(architectures[0] in QK_NORM, path, f"architecture {architectures[0]} is not supported", f"supported are {', '.join(QK_NORM)}")
    for key, supported, remedy in SUPPORTED:
        _require(supported(raw.get(key)), path, f"{key}={raw.get(key)!r} is not supported", remedy)


def _rope(path: pathlib.Path, raw: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """theta and scaling, from `rope_theta` and `rope_scaling`, or from `rope_parameters` as transformers 5 writes them."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0)))
    unknown = sorted(set(rope) - ROPE_KEYS)
    _require(
        not unknown, path, f"rotary parameters {', '.join(unknown)} are not supported", f"supported are {', '.join(sorted(ROPE_KEYS))}"
    )
    whole = rope.get("partial_rotary_factor") in (None, 1.0)
    _require(whole, path, f"partial_rotary_factor={rope.get('partial_rotary_factor')!r} is not supported", "only 1.0 is")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    _require(kind == "llama3", path, f"rope scaling of type {kind!r} is not supported", "supported are default and llama3")
    missing = [key for key in SCALING_KEYS if key not in rope]
    _require(not missing, path, f"llama3 rope scaling lacks {', '.join(missing)}", f"it needs {', '.join(SCALING_KEYS)}")
    return theta, Llama3Scaling(**{key: rope[key] for key in SCALING_KEYS})


def _end_tokens(directory: pathlib.Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """generation_config.json has the last word, as in Hugging Face: chat models list the end of a turn only there."""
    path = directory / "generation_config.json"
    eos = (read_json(path) if path.exists() else {}).get("eos_token_id", raw.get("eos_token_id"))
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
