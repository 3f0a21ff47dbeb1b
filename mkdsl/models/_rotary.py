"""Rotary parameters of a config.json, as transformers reads them for families that rotate whole heads by halves."""

from collections.abc import Callable

from mkdsl.models._fields import Fields
from mkdsl.ops import DynamicScaling, LinearScaling, Llama3Scaling, LongRopeScaling, Scaling, YarnScaling

ORIGINAL = "original_max_position_embeddings"


def read_rotary(fields: Fields, head_dim: int) -> tuple[float, Scaling | None]:
    """theta and scaling, from `rope_theta` and `rope_scaling`, or from `rope_parameters` as transformers 5 writes them."""
    rope = fields.section("rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters")  # the older one first, as there
    theta = (rope if "rope_theta" in rope.values else fields).number("rope_theta", 10_000.0)
    if unknown := sorted(set(rope.values) - KEYS):
        rope.refuse(unknown[0], f"supported rotary parameters are {', '.join(sorted(KEYS))}")
    if rope.values.get("partial_rotary_factor") not in (None, 1.0):
        rope.refuse("partial_rotary_factor", "only rotary embedding of whole heads is supported")
    key = "rope_type" if "rope_type" in rope.values else "type"
    kind = rope.values.get(key, "default")
    if kind == "default":
        return theta, None
    if not isinstance(kind, str) or kind not in SCALINGS:
        rope.refuse(key, f"supported are default, {', '.join(SCALINGS)}")
    return theta, SCALINGS[kind](rope, fields, head_dim)


def _linear(rope: Fields, fields: Fields, head_dim: int) -> Scaling:
    return LinearScaling(factor=rope.number("factor"))


def _dynamic(rope: Fields, fields: Fields, head_dim: int) -> Scaling:
    return DynamicScaling(factor=rope.number("factor"), max_position_embeddings=fields.integer("max_position_embeddings"))


def _llama3(rope: Fields, fields: Fields, head_dim: int) -> Scaling:
    scaling = Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=_original(rope, fields),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        rope.refuse("high_freq_factor", f"it should be above low_freq_factor={scaling.low_freq_factor}")
    return scaling


def _yarn(rope: Fields, fields: Fields, head_dim: int) -> Scaling:
    return YarnScaling(
        factor=_factor(rope, fields) if "factor" in rope.values else rope.number("factor"),
        original_max_position_embeddings=_original(rope, fields),
        beta_fast=_optional(rope, "beta_fast") or 32.0,
        beta_slow=_optional(rope, "beta_slow") or 1.0,
        attention_factor=_optional(rope, "attention_factor"),
        mscale=_optional(rope, "mscale"),
        mscale_all_dim=_optional(rope, "mscale_all_dim"),
        truncate=rope.flag("truncate", True),
    )


def _longrope(rope: Fields, fields: Fields, head_dim: int) -> Scaling:
    return LongRopeScaling(
        short_factor=rope.numbers("short_factor", head_dim // 2),
        long_factor=rope.numbers("long_factor", head_dim // 2),
        original_max_position_embeddings=_original(rope, fields),
        factor=_factor(rope, fields),
        attention_factor=_optional(rope, "attention_factor"),
    )


def _original(rope: Fields, fields: Fields) -> int:
    """Phi-3 has it beside `rope_scaling`, and there it counts first."""
    return (fields if ORIGINAL in fields.values else rope).integer(ORIGINAL, fields.integer("max_position_embeddings"))


def _factor(rope: Fields, fields: Fields) -> float:
    given = _optional(rope, "factor")
    return fields.integer("max_position_embeddings") / _original(rope, fields) if given is None else given


def _optional(rope: Fields, key: str) -> float | None:
    return None if rope.values.get(key) is None else rope.number(key)


SCALINGS: dict[str, Callable[[Fields, Fields, int], Scaling]] = {
    "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope,
}  # fmt: skip
KEYS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", ORIGINAL, "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "attention_factor", "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor",
}  # fmt: skip
