"""Tokens that other files than tokenizer.json add, held against what transformers makes of the same directory."""

import json

import pytest

from mkdsl.engine import load_tokenizer
from mkdsl.models import CheckpointError

TEXT = "a<|im_start|>b <|im_end|>c<tool> d</s>e <pad>"
CHAT = [{"role": "user", "content": TEXT}]
TEMPLATE = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ image_token }}|{{ messages[0].content }}"


def token(content, **flags):
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True} | flags


def named(content, **flags):
    return {"__type": "AddedToken"} | token(content, **flags)


DECODER = {"258": token("<|im_start|>"), "259": token("<|im_end|>", rstrip=True), "260": token("<tool>", special=False, normalized=True)}
OLD = {"<|im_start|>": 258, "<|im_end|>": 259, "<tool>": 260}
CONFIGS = {
    "nothing more": {"tokenizer_config.json": {}},
    "no config": {},
    "added_tokens_decoder": {"tokenizer_config.json": {"added_tokens_decoder": DECODER}},
    "added_tokens_decoder, named": {
        "tokenizer_config.json": {"added_tokens_decoder": DECODER, "eos_token": "<tool>", "pad_token": "<pad>"}
    },
    "added_tokens_decoder over tokenizer.json": {"tokenizer_config.json": {"added_tokens_decoder": {"257": token("</s>", special=False)}}},
    "added_tokens_decoder over the other files": {
        "tokenizer_config.json": {"added_tokens_decoder": DECODER},
        "special_tokens_map.json": {"pad_token": "<pad>"},
        "added_tokens.json": {"<other>": 261},
    },
    "added_tokens.json": {"added_tokens.json": OLD},
    "added_tokens.json, some special": {
        "added_tokens.json": OLD,
        "special_tokens_map.json": {"additional_special_tokens": ["<|im_start|>"]},
    },
    "added_tokens.json, special in the config": {
        "added_tokens.json": OLD,
        "tokenizer_config.json": {"additional_special_tokens": ["<|im_start|>"], "image_token": "<|im_end|>"},
    },
    "added_tokens.json, others by name": {
        "added_tokens.json": OLD,
        "tokenizer_config.json": {"extra_special_tokens": {"image_token": "<|im_start|>"}},
    },
    "added_tokens.json that repeats tokenizer.json": {"added_tokens.json": {"<s>": 256, "</s>": 257, **OLD}},
    "special_tokens_map.json": {
        "special_tokens_map.json": {"bos_token": token("<s>"), "eos_token": "<|im_end|>", "pad_token": token("<pad>")}
    },
    "special_tokens_map.json over the config": {
        "tokenizer_config.json": {"eos_token": "</s>", "pad_token": None},
        "special_tokens_map.json": {"eos_token": "<|im_end|>"},
    },
    "special_tokens_map.json with others": {"special_tokens_map.json": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}},
    "named in the config": {
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": named("<|im_end|>", lstrip=True), "pad_token": "<pad>"}
    },
    "named by the checkpoint": {"tokenizer_config.json": {"image_token": "<|im_start|>", "bos_token": "<s>"}},
    "named in a map": {"tokenizer_config.json": {"extra_special_tokens": {"image_token": "<|im_start|>"}}},
    "others": {"tokenizer_config.json": {"additional_special_tokens": ["<|im_start|>", named("<|im_end|>")]}},
    "others, transformers 5": {
        "tokenizer_config.json": {"extra_special_tokens": ["<|im_start|>"], "additional_special_tokens": ["<tool>"]}
    },
    "a character of the vocabulary": {"tokenizer_config.json": {"eos_token": "c"}},
}


@pytest.mark.parametrize("files", CONFIGS.values(), ids=CONFIGS)
def test_as_transformers(checkpoint, transformers_of, files):
    write(checkpoint, files)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    ours, theirs = load_tokenizer(checkpoint), transformers_of(checkpoint)
    tokens = ours.encode(TEXT)
    assert tokens == theirs(TEXT)["input_ids"]
    assert "".join(ours.stream(tokens)) == theirs.decode(tokens, skip_special_tokens=True)
    assert ours.encode_chat(CHAT) == theirs.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert ours.specials == theirs.special_tokens_map


def write(checkpoint, files):
    (checkpoint / "tokenizer_config.json").unlink()
    for name, content in files.items():
        (checkpoint / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "files", [{"added_tokens.json": {"<tool>": 300}}, {"tokenizer_config.json": {"added_tokens_decoder": {"300": token("<tool>")}}}]
)
def test_a_number_that_is_not_the_next(checkpoint, files):
    """transformers gives such a token another number than the weights know, and says nothing."""
    write(checkpoint, files)
    with pytest.raises(CheckpointError, match=r"adds the token <tool> as 300, after tokenizer.json's it is 258; one of the two is wrong"):
        load_tokenizer(checkpoint)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"added_tokens_decoder": {"258": 5}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"last": token("<tool>")}}},
        {"tokenizer_config.json": {"added_tokens_decoder": ["<tool>"]}},
        {"tokenizer_config.json": {"eos_token": {"lstrip": True}}},
        {"tokenizer_config.json": {"eos_token": {"content": 3}}},
        {"added_tokens.json": {"<tool>": None}},
    ],
)
def test_tokens_that_are_none(checkpoint, files):
    write(checkpoint, files)
    with pytest.raises(CheckpointError, match=r"the tokens in its tokenizer_config.json or beside it are broken \("):
        load_tokenizer(checkpoint)
