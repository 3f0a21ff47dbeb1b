"""How a checkpoint's makers would have its answers sampled."""

import pathlib

from mkdsl.engine._sampling import SamplingError, SamplingParams
from mkdsl.models import CheckpointError, read_json

FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # of generation_config.json; all else there says nothing here
OTHERWISE = SamplingParams(temperature=0.7, top_p=0.95)


def chat_defaults(directory: pathlib.Path) -> SamplingParams:
    """What generation_config.json says of sampling; temperature 0.7 and top_p 0.95 where it says nothing, or is not there.

    As Hugging Face has it, what is null is not there, a top_k of 0 is none, and with "do_sample": false the most likely token is taken.

    Raises:
      CheckpointError: the file is broken, or a value is outside its range.
    """
    path = directory / "generation_config.json"
    said = read_json(path) if path.exists() else {}
    if said.get("do_sample") is False:
        return SamplingParams(temperature=0.0)
    found = {name: said[name] for name in FIELDS if said.get(name) is not None}
    if found.get("top_k") == 0:
        del found["top_k"]
    try:
        return SamplingParams(**found) if found else OTHERWISE
    except SamplingError as error:
        raise CheckpointError(f"{path}: {error}; correct it, or remove the field") from None
