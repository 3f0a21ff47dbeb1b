"""The DSL: operators as JAX functions. Nothing here knows of GPUs or schedules."""

from mkdsl.ops._attention import Append, AppendToPage, Attention, append, attention
from mkdsl.ops._fold import LINEAR, Fold, dot, fold, linear
from mkdsl.ops._layers import layers, prefill, tile
from mkdsl.ops._operator import Operator, operator_p
from mkdsl.ops._paged import Paged, batch_axes, contiguous, place, shared_leaves
from mkdsl.ops._rope import Rope, heads, rope
from mkdsl.ops._rope_scaling import DynamicScaling, LinearScaling, Llama3Scaling, LongRopeScaling, Scaling, YarnScaling
from mkdsl.ops._row import layer_norm, rms_norm
from mkdsl.ops._token import Argmax, Embed, argmax, embed

__all__ = [
    "LINEAR", "Append", "AppendToPage", "Argmax", "Attention", "DynamicScaling", "Embed", "Fold", "LinearScaling", "Llama3Scaling",
    "LongRopeScaling", "Operator", "Paged", "Rope", "Scaling", "YarnScaling", "append", "argmax", "attention", "batch_axes", "contiguous", "dot", "embed",
    "fold", "heads", "layer_norm", "layers", "linear", "operator_p", "place", "prefill", "rms_norm", "rope", "shared_leaves", "tile",
]  # fmt: skip
