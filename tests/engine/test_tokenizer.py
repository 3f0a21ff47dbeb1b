"""Tokens and text, held against what transformers makes of the same directory."""

import json

import pytest
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from mkdsl.engine import PromptError, load_tokenizer
from mkdsl.models import CheckpointError

USER = [{"role": "user", "content": "hé"}]
TEXTS = ["hé", "", "a much longer text than any other here", " <s> in the middle</s> ", "日本語 😀\n"]


def test_plain_text_gets_its_beginning_token(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    tokens = tokenizer.encode("hé")
    assert tokens[0] == 256
    assert len(tokens) == 4  # é is two bytes
    assert "".join(tokenizer.stream(tokens)) == "hé"


def test_chat_follows_the_template(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    tokens = tokenizer.encode_chat(USER)
    assert tokens.count(256) == 1  # the template's own, no second one
    assert tokenizer.model.decode(tokens, skip_special_tokens=False) == "<s><user>hé<assistant>"  # blocks trimmed as Hugging Face does


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "saved",
    [
        lambda model: None,
        lambda model: model.enable_truncation(5),
        lambda model: model.enable_padding(length=64),
        lambda model: (model.enable_truncation(5), model.enable_padding(pad_to_multiple_of=16)),
    ],
    ids=["as it is", "saved with truncation", "saved with padding", "with both"],
)
def test_nothing_is_cut_or_padded(checkpoint, transformers_of, saved, text):
    path = str(checkpoint / "tokenizer.json")
    model = load_tokenizer(checkpoint).model
    saved(model)
    model.save(path)
    ours, theirs = load_tokenizer(checkpoint), transformers_of(checkpoint)
    chat = [{"role": "user", "content": text}]
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.encode_chat(chat) == theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert "".join(ours.stream(ours.encode(text))) == theirs.decode(ours.encode(text), skip_special_tokens=True)


@pytest.mark.parametrize("text", ["naïve café", "日本語", "😀 👩‍👩‍👧 end", "aà€😀", "", "\ufffd and on"])
def test_streaming_shows_whole_characters_only(checkpoint, text):
    tokenizer = load_tokenizer(checkpoint)
    pieces = list(tokenizer.stream(tokenizer.model.encode(text, add_special_tokens=False).ids))
    assert "".join(pieces) == text
    assert all(pieces)
    if "\ufffd" not in text:
        assert pieces == list(text)  # each as soon as its last byte is there


def test_streaming_ends_with_what_is_left(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    half = tokenizer.model.encode("ab€", add_special_tokens=False).ids[:-1]
    assert list(tokenizer.stream([*half, 257])) == ["a", "b", "\ufffd"]


def test_streaming_is_lazy(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    tokens = iter(tokenizer.encode("abc"))
    assert next(tokenizer.stream(tokens)) == "a"
    assert len(list(tokens)) == 2


@pytest.mark.parametrize("encode", [lambda t, text: t.encode(text), lambda t, text: t.encode_chat([{"role": "user", "content": text}])])
def test_bytes_that_are_not_utf_8(checkpoint, encode):
    argument = b"caf\xe9".decode(errors="surrogateescape")  # as Python hands over a command line's
    with pytest.raises(PromptError, match=r"the prompt has '\\udce9', which is no character: it is not UTF-8; give it as UTF-8 text"):
        encode(load_tokenizer(checkpoint), argument)


def test_no_tokenizer(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json: it is not there"):
        load_tokenizer(checkpoint)


def test_broken_tokenizer(checkpoint):
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: broken \(.*\); download it again"):
        load_tokenizer(checkpoint)


def test_the_config_beside_it_may_be_missing(checkpoint):
    (checkpoint / "tokenizer_config.json").unlink()
    assert load_tokenizer(checkpoint).specials == {}


QWEN3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("text", ["the text 123  e\u0301\n", "<|im_start|>user\nhe<|im_end|> <think>x", "it's\t\t<|endoftext|>1"])
def test_qwen3s(tmp_path, transformers, text):
    """Of the class that transformers builds anew for Qwen3, from a tokenizer.json as Qwen3's, with Qwen3's added tokens."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "Ġt"]
    model = tokenizers.Tokenizer(BPE({word: i for i, word in enumerate(words)}, [("h", "e"), ("Ġ", "t")]))
    model.normalizer, model.decoder = normalizers.NFC(), decoders.ByteLevel()
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN3), "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    model.save(str(tmp_path / "tokenizer.json"))
    added = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<think>": False}
    decoder = {
        len(words) + i: {"content": token, "special": special, "normalized": False} for i, (token, special) in enumerate(added.items())
    }
    about = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokens = ours.encode(text)
    assert tokens == theirs(text)["input_ids"]
    assert "".join(ours.stream(tokens)) == theirs.decode(tokens, skip_special_tokens=True)


def test_special_tokens_split_where_the_config_says_so(checkpoint, transformers_of):
    path = checkpoint / "tokenizer_config.json"
    about = json.loads(path.read_text()) | {"bos_token": "<s>", "split_special_tokens": True}
    path.write_text(json.dumps(about))
    tokens = load_tokenizer(checkpoint).encode("a</s>b")
    assert tokens == transformers_of(checkpoint)("a</s>b")["input_ids"]
    assert 257 not in tokens
