"""mkdsl compiles a JAX decode step into one persistent GPU kernel whose every decision was made before it ran."""

from mkdsl.gpu import jit
from mkdsl.graph import UnsupportedError
from mkdsl.ops import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Paged,
    YarnScaling,
    append,
    argmax,
    attention,
    batch_axes,
    dot,
    embed,
    fold,
    heads,
    layer_norm,
    layers,
    linear,
    prefill,
    rms_norm,
    rope,
    tile,
)

__all__ = [
    "DynamicScaling", "LinearScaling", "Llama3Scaling", "LongRopeScaling", "Paged", "UnsupportedError", "YarnScaling", "append", "argmax",
    "attention", "batch_axes", "dot", "embed", "fold", "heads", "jit", "layer_norm", "layers", "linear", "prefill", "rms_norm", "rope", "tile",
]  # fmt: skip
