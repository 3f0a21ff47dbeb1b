"""Which safetensors files make up a checkpoint; or why those that are there do not."""

import pathlib
import re
from collections.abc import Iterable, Mapping

from mkdsl.models._errors import CheckpointError
from mkdsl.models._fields import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
VARIANT = re.compile(r"model(?:-\d+-of-\d+)?\.(\w+)(?:-\d+-of-\d+)?\.safetensors")  # as transformers names what variant="fp16" saved

# What the end of a tensor's name says of its checkpoint, whatever config.json says: how the weights are stored, and what to do instead.
_ORIGINAL = "only unquantised bf16, f16 and f32 weights are supported: take the original checkpoint"
_MERGED = "merge it into its model (peft's merge_and_unload, then save_pretrained) and give the merged checkpoint"
STORED: Mapping[tuple[str, ...], tuple[str, str]] = {
    (".qweight", ".qzeros", ".g_idx"): ("4-bit weights of AWQ or GPTQ", _ORIGINAL),
    (".weight_scale", ".weight_scale_inv", ".input_scale"): ("FP8 or INT8 weights with scales", _ORIGINAL),
    (".weight_packed",): ("packed weights of compressed-tensors", _ORIGINAL),
    (".absmax", ".quant_map", ".SCB"): ("4-bit or 8-bit weights of bitsandbytes", _ORIGINAL),
    (".lora_A.weight", ".lora_B.weight"): ("a LoRA adapter", _MERGED),
}


def weight_files(directory: pathlib.Path) -> tuple[list[pathlib.Path], Mapping[str, str]]:
    """The files of a checkpoint's weights, and in which of them its index places each tensor; {} where it has no index.

    Raises:
      CheckpointError: no such files are there, or not all of them.
    """
    if (directory / SINGLE).exists():
        return [directory / SINGLE], {}
    if (directory / INDEX).exists():
        places = _places(directory / INDEX)
        return [directory / name for name in sorted(set(places.values()))], places
    names = sorted(p.name for p in directory.iterdir())
    if not any(map(SHARD.fullmatch, names)):
        raise CheckpointError(f"{directory}: {_no_weights(names)}")
    return [directory / name for name in _all_shards(directory, names)], {}


def check_stored(directory: pathlib.Path, tensors: Iterable[str]) -> None:
    """Raises CheckpointError for tensors of a quantised checkpoint or an adapter, whose config.json may not say so."""
    for name in sorted(tensors):
        for ends, (what, remedy) in STORED.items():
            if name.endswith(ends):
                raise CheckpointError(f"{directory}: holds {name}, which is of {what}; {remedy}")


def _places(index: pathlib.Path) -> dict[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) and name == pathlib.Path(name).name for name in places.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensors to files beside it; download it again")
    return places


def _all_shards(directory: pathlib.Path, names: list[str]) -> list[str]:
    """The shards that are there without an index: all of one set, or CheckpointError."""
    shards = [match for match in map(SHARD.fullmatch, names) if match]
    totals = sorted({match[2] for match in shards})
    if len(totals) > 1:
        raise CheckpointError(f"{directory}: holds shards of sets of {' and '.join(totals)}; remove those of all sets but one")
    wanted = [f"model-{i:0{len(shards[0][1])}}-of-{totals[0]}.safetensors" for i in range(1, int(totals[0]) + 1)]
    if missing := [name for name in wanted if name not in names]:
        raise CheckpointError(f"{directory}: lacks {missing[0]}, one of {len(missing)} missing shards of {int(totals[0])}; download it")
    return wanted


def _no_weights(names: list[str]) -> str:
    """What a directory holds instead of the files wanted, and the remedy."""
    if variant := next(filter(None, map(VARIANT.fullmatch, names)), None):
        kind = variant[1]
        return f"holds the weights as variant {kind} ({variant[0]}); take .{kind} out of the names of its files, and of the index if there is one"
    if named := [name for name in names if name.endswith(".safetensors")]:
        return f"holds {', '.join(named[:3])}; the weights' files should be {SINGLE}, or model-00001-of-0000N.safetensors and so on"
    return f"holds neither {SINGLE} nor {INDEX}, only {', '.join(names)}; convert the weights to safetensors"
