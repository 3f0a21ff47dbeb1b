"""Decoder families written in the DSL, and their weights from Hugging Face checkpoints."""

from mkdsl.models._checkpoint import Progress, load
from mkdsl.models._config import DecoderConfig, read_config
from mkdsl.models._decoder import DecodeStep, abstract_params, decode_step, init_cache, random_params
from mkdsl.models._errors import CheckpointError, MissingExtra, extra
from mkdsl.models._fields import read_json, read_text
from mkdsl.models._shapes import SHAPES

__all__ = [
    "SHAPES", "CheckpointError", "DecodeStep", "DecoderConfig", "MissingExtra", "Progress", "abstract_params", "decode_step", "extra", "init_cache",
    "load", "random_params", "read_config", "read_json", "read_text",
]  # fmt: skip
