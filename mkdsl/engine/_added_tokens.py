"""Tokens that a checkpoint adds beside tokenizer.json, from the files that transformers reads. Imported where it is used: it needs tokenizers."""

import pathlib
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

from mkdsl.models import CheckpointError, read_json

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def read_options(directory: pathlib.Path) -> dict[str, Any]:
    """tokenizer_config.json; where it has no `added_tokens_decoder`, with special_tokens_map.json and added_tokens.json over it."""

    def read(name: str) -> dict[str, Any]:
        return read_json(directory / name) if (directory / name).exists() else {}

    options = read("tokenizer_config.json")
    if "additional_special_tokens" in options and not options.get("extra_special_tokens"):  # its name before transformers 5
        options["extra_special_tokens"] = options.pop("additional_special_tokens")
    if "added_tokens_decoder" in options:
        return options
    return options | read("special_tokens_map.json") | {"added_tokens": read("added_tokens.json")}


def add_tokens(model: Tokenizer, directory: pathlib.Path, options: Mapping[str, Any]) -> dict[str, str]:
    """Adds to a tokenizer what tokenizer.json lacks of its checkpoint's tokens: they would be split, or shown as text.

    Args:
      model: the tokenizer, changed in place.
      directory: the checkpoint.
      options: from `read_options`.

    Returns:
      The special tokens by the names under which a chat template knows them, as bos_token.

    Raises:
      CheckpointError: a token is none, or its number is not the next one.
    """
    try:
        named, more, declared = _named(options), _unnamed(options), _declared(model, options)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory}: the tokens in its tokenizer_config.json or beside it are broken ({error})") from None
    known = {token.content for token in model.get_added_tokens_decoder().values()}
    listed = known | {token.content for token in declared.values()}
    for token in declared.values():
        token.special = token.special or token.content in {special.content for special in named.values()}
    model.add_tokens([declared[id] for id in sorted(declared)])
    model.add_tokens([token for token in (*named.values(), *more) if token.content not in listed])
    for id, token in declared.items():
        if token.content not in known:
            _check_number(directory, token.content, id, model.token_to_id(token.content))
    return {name: token.content for name, token in named.items()}


def _check_number(directory: pathlib.Path, token: str, declared: int, here: int | None) -> None:
    """Added tokens are counted on from tokenizer.json's: another number would be another row of the embedding."""
    if here != declared:
        raise CheckpointError(
            f"{directory}: adds the token {token} as {declared}, after tokenizer.json's it is {here}; one of the two is wrong"
        )


def _named(options: Mapping[str, Any]) -> dict[str, AddedToken]:
    """bos_token and so on: NAMED first, then any other, which are the checkpoint's own."""
    own = options.get("extra_special_tokens")
    values = {key: value for key, value in options.items() if key.endswith("_token") and isinstance(value, str | dict)}
    values |= own if isinstance(own, dict) else {}
    return {key: _token(values[key], special=True) for key in dict.fromkeys((*NAMED, *values)) if key in values}


def _unnamed(options: Mapping[str, Any]) -> list[AddedToken]:
    """The other special tokens."""
    unnamed = options.get("extra_special_tokens") or options.get("additional_special_tokens") or []
    return [] if isinstance(unnamed, dict) else [_token(value, special=True) for value in unnamed]


def _declared(model: Tokenizer, options: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Added tokens by their numbers. Of added_tokens.json those are special that are so elsewhere, and tokenizer.json knows better."""
    if "added_tokens_decoder" in options:
        return {int(id): _token(value) for id, value in options["added_tokens_decoder"].items()}
    named, more = _named(options), options.get("extra_special_tokens")  # not by its other name in special_tokens_map.json
    special = {named[key].content for key in NAMED if key in named} | {_token(token).content for token in more or ()}
    old = {int(id): AddedToken(t, normalized=t not in special, special=t in special) for t, id in options["added_tokens"].items()}
    return old | model.get_added_tokens_decoder()


def _token(value: Any, **flags: bool) -> AddedToken:
    """A token as the files write it: its text alone, or an object with how it is matched."""
    if isinstance(value, str):
        return AddedToken(value, **flags)
    return AddedToken(value["content"], **({key: value[key] for key in FLAGS if key in value} | flags))
