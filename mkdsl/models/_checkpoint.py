"""Weights from a Hugging Face checkpoint: safetensors, in one file or in shards, stacked over layers in bf16 on the device.

Everything is checked from the files' headers before a weight is read: a checkpoint is refused in milliseconds, by the tensor's name. Then shard after
shard is opened, and each of its tensors goes to its row of a stack that is on the device already. So neither the host nor the device ever has
more of the model than the device's one copy, and the tensors on their way.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mkdsl.models._config import DecoderConfig, read_config
from mkdsl.models._decoder import abstract_params
from mkdsl.models._errors import CheckpointError, extra
from mkdsl.models._files import INDEX, check_stored, weight_files

Progress = Callable[[int, int], None]  # (bytes read, of how many)

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
ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4}  # of the types that are read, by safetensors' names


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """What a file's header says of a tensor."""

    path: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor belongs: a leaf of the parameters, and there a layer's row, or None for all of it."""

    leaf: int
    row: int | None
    shape: tuple[int, ...]


def load(directory: str | pathlib.Path, *, progress: Progress | None = None) -> tuple[DecoderConfig, Any]:
    """Loads a Llama or Qwen3 checkpoint onto JAX's default device, shard by shard.

    At most two tensors are in host memory, one read while the other is on its way, beside what the operating system keeps mapped of one shard. On the
    device they are beside the parameters for as long. Where that device is the host's CPU, the parameters are in host memory, once.

    Args:
      directory: holds config.json and model.safetensors, or shards, with model.safetensors.index.json or without.
      progress: called with the bytes that are read and those that there are: at first, after each tensor, and when all are on the device.

    Returns:
      The config, and parameters in bf16 structured as `abstract_params`.

    Raises:
      CheckpointError: a file is missing or broken, the model is not supported, or the tensors are not those that its config names.
      MissingExtra: safetensors is not installed.
    """
    directory = pathlib.Path(directory)
    config = read_config(directory)
    tensors, said_by = _headers(directory)
    leaves, structure = jax.tree.flatten_with_path(abstract_params(config))
    places = {name: place for number, (path, leaf) in enumerate(leaves) for name, place in _places(path[-1].key, number, leaf)}
    check_stored(directory, tensors)
    _check_names(directory, said_by, set(tensors), set(places))
    for name, place in places.items():
        _check_kind(tensors[name], place.shape)
    read = _read([tensors[name] for name in places], places, [leaf for _, leaf in leaves], progress or (lambda *_: None))
    return config, jax.tree.unflatten(structure, read)


def _names(leaf: str, layers: int) -> list[str]:
    """Hugging Face's names of the tensors that make up a parameter."""
    return [ENDS[leaf]] if leaf in ENDS else [f"model.layers.{i}.{LAYER[leaf]}.weight" for i in range(layers)]


def _places(key: str, number: int, leaf: jax.ShapeDtypeStruct) -> Iterator[tuple[str, _Place]]:
    """The names of a leaf's tensors, and their places."""
    for row, name in enumerate(_names(key, leaf.shape[0])):
        yield name, _Place(number, None, leaf.shape) if key in ENDS else _Place(number, row, leaf.shape[1:])


def _read(
    tensors: Sequence[_Tensor], places: Mapping[str, _Place], leaves: Sequence[jax.ShapeDtypeStruct], progress: Progress
) -> list[Any]:
    """All leaves, on the device. The next tensor is read while the one before it is copied."""
    stacked = {place.leaf: leaves[place.leaf] for place in places.values() if place.row is not None}
    params: list[Any] = [None] * len(leaves)
    for leaf, stack in zip(stacked, _empty(tuple((leaf.shape, leaf.dtype) for leaf in stacked.values())), strict=True):
        params[leaf] = stack
    done, total, before = 0, sum(tensor.bytes for tensor in tensors), None
    progress(done, total)
    for tensor, host in _from_files(tensors):
        place = places[tensor.name]
        host = host.astype(leaves[place.leaf].dtype, copy=False)
        jax.block_until_ready(before)
        sent = jax.device_put(host)
        before = params[place.leaf] = sent if place.row is None else _with_row(params[place.leaf], sent, place.row)
        done += tensor.bytes
        progress(done, total)
    jax.block_until_ready(params)
    return params


def _from_files(tensors: Sequence[_Tensor]) -> Iterator[tuple[_Tensor, np.ndarray]]:
    """Tensors and their data, one file after the other: no two of them are open, or mapped, at the same time."""
    for path, group in itertools.groupby(sorted(tensors, key=lambda tensor: (tensor.path, tensor.name)), key=lambda tensor: tensor.path):
        with _open(path) as file:
            for tensor in group:
                yield tensor, file.get_tensor(tensor.name)


@functools.partial(jax.jit, static_argnums=0)
def _empty(kinds: tuple[tuple[tuple[int, ...], Any], ...]) -> list[jax.Array]:
    return [jnp.zeros(shape, dtype) for shape, dtype in kinds]


@functools.partial(jax.jit, donate_argnums=0)
def _with_row(stack: jax.Array, row: jax.Array, layer: jax.Array) -> jax.Array:
    """The stack with one more row, in its own memory."""
    return lax.dynamic_update_index_in_dim(stack, row, layer, 0)


def _headers(directory: pathlib.Path) -> tuple[dict[str, _Tensor], pathlib.Path]:
    """Every tensor of a checkpoint, by name; and the file, or else the directory, that says which there are."""
    files, shards = weight_files(directory)
    tensors = {tensor.name: tensor for file in files for tensor in _header(file)}
    for name, shard in shards.items():
        if name not in tensors:
            raise CheckpointError(f"{directory / shard}: lacks {name}, which {INDEX} places there; download the file again")
    return tensors, directory / INDEX if shards else files[0] if len(files) == 1 else directory


def _header(path: pathlib.Path) -> Iterator[_Tensor]:
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118 (a file is no dict)
            header = file.get_slice(name)
            yield _Tensor(path, name, tuple(header.get_shape()), header.get_dtype())


def _open(path: pathlib.Path) -> Any:
    with extra("hf"):
        from safetensors import SafetensorError, safe_open
    try:
        return safe_open(path, "numpy")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: this shard is not there, though {INDEX} names it; download it") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or corrupt ({error}), {path.stat().st_size} bytes; download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def _check_names(directory: pathlib.Path, said_by: pathlib.Path, found: set[str], wanted: set[str]) -> None:
    if missing := wanted - found:
        raise CheckpointError(f"{said_by}: lacks {_some(missing)}; download it again, or correct config.json")
    # Old checkpoints store rotary frequencies, and some tied ones their embedding twice: both say nothing that config.json does not.
    unknown = {name for name in found - wanted if not name.endswith("rotary_emb.inv_freq") and name != ENDS["lm_head"]}
    if unknown:
        raise CheckpointError(f"{directory}: holds {_some(unknown)}, of which config.json says nothing; the two belong to different models")


def _some(names: set[str]) -> str:
    few = ", ".join(sorted(names)[:3])
    return few if len(names) <= 3 else f"{few} and {len(names) - 3} more tensors"


def _check_kind(t: _Tensor, shape: tuple[int, ...]) -> None:
    if t.shape != shape:
        raise CheckpointError(f"{t.path}: {t.name} has shape {t.shape} where config.json wants {shape}; the two belong to different models")
    if t.dtype not in ITEMSIZE:
        raise CheckpointError(f"{t.path}: {t.name} is {t.dtype}; supported are {', '.join(ITEMSIZE)}: take the unquantised checkpoint")
