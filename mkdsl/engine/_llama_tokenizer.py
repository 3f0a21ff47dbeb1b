"""Tokenizers of Llama 1 and 2 and their kin, which transformers builds anew around their vocabulary. Imported where it is used: it needs tokenizers."""

import pathlib
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers

from mkdsl.models import read_json, read_text

SPACE = "▁"
SPECIALS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def is_llama_tokenizer(directory: pathlib.Path, options: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's class is LlamaTokenizer and its tokenizer is no byte-level one, as Llama 3's under that name is."""
    path = directory / "config.json"
    name = options.get("tokenizer_class") or (read_json(path) if path.exists() else {}).get("tokenizer_class")
    return str(name).removesuffix("Fast") == "LlamaTokenizer" and '"ByteLevel"' not in read_text(directory / "tokenizer.json")


def with_llama_spaces(model: Tokenizer, options: Mapping[str, Any]) -> dict[str, Any]:
    """Has a tokenizer treat spaces as LlamaTokenizer's options say, whatever tokenizer.json says: it is older than they are.

    Args:
      model: the tokenizer, changed in place.
      options: `add_prefix_space`, true by default: the text begins with a space. `legacy`: and so does what follows a special token.

    Returns:
      The options, with LlamaTokenizer's special tokens where they name none.
    """
    prefix = options.get("add_prefix_space") is not False
    scheme = "never" if not prefix else "always" if options.get("legacy") else "first"
    model.normalizer = None
    model.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    whole = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence([*whole, decoders.Strip(" ", 1, 0)] if prefix else whole)
    return SPECIALS | dict(options)
