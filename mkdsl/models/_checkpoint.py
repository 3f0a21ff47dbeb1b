"""Weights from a Hugging Face checkpoint: safetensors, in one file or in shards, stacked over layers in bf16.

Everything is checked from the files' headers before a weight is read: a checkpoint is refused in milliseconds, by the tensor's name.
"""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mkdsl.models._config import DecoderConfig, read_config
from mkdsl.models._decoder import abstract_params
from mkdsl.models._errors import CheckpointError, extra
from mkdsl.models._files import INDEX, check_stored, weight_files

ENDS = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "lm_head": "lm_head.weight"}
LAYER = {
    "input_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "post_norm": "post_attention_layernorm",
    "wg": "mlp.gate_proj",
    "wu": "mlp.up_proj",
    "wd": "mlp.down_proj",
}
DTYPES = ("BF16", "F16", "F32")


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of a file: its header is known, its data not yet read."""

    path: pathlib.Path
    file: Any  # an open safetensors file
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.name)


def load(directory: str | pathlib.Path) -> tuple[DecoderConfig, Any]:
    """Loads a Llama or Qwen3 checkpoint onto JAX's default device.

    At most one parameter, stacked over its layers, is in host memory beside the device's copy.

    Args:
      directory: holds config.json and model.safetensors, or shards, with model.safetensors.index.json or without.

    Returns:
      The config, and parameters in bf16 structured as `abstract_params`.

    Raises:
      CheckpointError: a file is missing or broken, the model is not supported, or the tensors are not those that its config names.
      MissingExtra: safetensors is not installed.
    """
    directory = pathlib.Path(directory)
    config = read_config(directory)
    tensors = _open_all(directory)
    wanted = abstract_params(config)
    leaves, structure = jax.tree.flatten_with_path(wanted)
    names = [_names(path[-1].key, config.layers) for path, _ in leaves]
    check_stored(directory, tensors)
    _check_names(directory, tensors, {name for group in names for name in group})
    for group, (_, leaf) in zip(names, leaves, strict=True):
        _check_kind([tensors[name] for name in group], leaf.shape if group[0] in ENDS.values() else leaf.shape[1:])
    read = [_stack([tensors[name] for name in group], leaf) for group, (_, leaf) in zip(names, leaves, strict=True)]
    return config, jax.tree.unflatten(structure, read)


def _names(leaf: str, layers: int) -> list[str]:
    """Hugging Face's names of the tensors that make up a parameter."""
    return [ENDS[leaf]] if leaf in ENDS else [f"model.layers.{i}.{LAYER[leaf]}.weight" for i in range(layers)]


def _stack(tensors: list[_Tensor], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    host = np.empty(leaf.shape, leaf.dtype)
    for row, tensor in zip(host.reshape(len(tensors), *tensors[0].shape), tensors, strict=True):
        row[...] = tensor.read()
    return jnp.asarray(host)


def _open_all(directory: pathlib.Path) -> dict[str, _Tensor]:
    """Every tensor of a checkpoint, by name."""
    files, places = weight_files(directory)
    tensors = {}
    for file in files:
        tensors |= _open(file)
    for name, shard in places.items():
        if name not in tensors:
            raise CheckpointError(f"{directory / shard}: lacks {name}, which {INDEX} places there; download the file again")
    return tensors


def _open(path: pathlib.Path) -> dict[str, _Tensor]:
    with extra("hf"):
        from safetensors import SafetensorError, safe_open
    try:
        file: Any = safe_open(path, "numpy")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: this shard is not there, though {INDEX} names it; download it") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or corrupt ({error}), {path.stat().st_size} bytes; download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (a file is no dict)
    return {name: _Tensor(path, file, name, tuple(h.get_shape()), h.get_dtype()) for name, h in headers.items()}


def _check_names(directory: pathlib.Path, tensors: Iterable[str], wanted: set[str]) -> None:
    found = set(tensors)
    if missing := wanted - found:
        raise CheckpointError(f"{directory}: lacks {_some(missing)}; download it again, or correct config.json")
    # Old checkpoints store rotary frequencies, and some tied ones their embedding twice: both say nothing that config.json does not.
    unknown = {name for name in found - wanted if not name.endswith("rotary_emb.inv_freq") and name != ENDS["lm_head"]}
    if unknown:
        raise CheckpointError(f"{directory}: holds {_some(unknown)}, of which config.json says nothing; the two belong to different models")


def _some(names: set[str]) -> str:
    few = ", ".join(sorted(names)[:3])
    return few if len(names) <= 3 else f"{few} and {len(names) - 3} more tensors"


def _check_kind(tensors: list[_Tensor], shape: tuple[int, ...]) -> None:
    for t in tensors:
        if t.shape != shape:
            raise CheckpointError(
                f"{t.path}: {t.name} has shape {t.shape} where config.json wants {shape}; the two belong to different models"
            )
        if t.dtype not in DTYPES:
            raise CheckpointError(f"{t.path}: {t.name} is {t.dtype}; supported are {', '.join(DTYPES)}: take the unquantised checkpoint")
