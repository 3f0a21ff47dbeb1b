"""Tokenizers of Llama 2's kind, held against what transformers makes of the same directory."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from mkdsl.engine import load_tokenizer

TEXTS = ["the text", " two spaces  after", "a</s>\n<s>b", "é </s>the<s>", "", "<s> x"]


@pytest.fixture
def directory(tmp_path):
    """A tokenizer.json as Llama 2's: a space before the text and after every special token, and bytes for what is not in the vocabulary."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abehtx", "▁t", "▁th"]
    tokenizer = Tokenizer(
        BPE({word: i for i, word in enumerate(words)}, [("▁", "t"), ("▁t", "h")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}\nx{% endfor %}")
    return tmp_path


OPTIONS = [
    {"tokenizer_class": "LlamaTokenizer"},
    {"tokenizer_class": "LlamaTokenizer", "legacy": True},
    {"tokenizer_class": "LlamaTokenizer", "legacy": False},
    {"tokenizer_class": "LlamaTokenizerFast", "legacy": False},
    {"tokenizer_class": "LlamaTokenizer", "legacy": None, "add_prefix_space": None},
    {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
    {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": True, "bos_token": None},
    {"tokenizer_class": "PreTrainedTokenizerFast", "legacy": False, "bos_token": "<s>", "eos_token": "</s>"},
    {"eos_token": "</s>"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=map(str, OPTIONS))
def test_as_transformers(directory, transformers, options):
    (directory / "tokenizer_config.json").write_text(json.dumps(options))
    compare(directory, transformers)


def compare(directory, transformers):
    ours, theirs = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        tokens, chat = ours.encode(text), [{"role": "user", "content": text}]
        assert tokens == theirs(text)["input_ids"]
        assert "".join(ours.stream(tokens)) == theirs.decode(tokens, skip_special_tokens=True)
        assert ours.encode_chat(chat) == theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ours.specials == theirs.special_tokens_map


def test_the_class_may_stand_in_config_json(directory, transformers):
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}))
    compare(directory, transformers)


def test_a_byte_level_tokenizer_of_that_class_stays(checkpoint, transformers):
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    config = checkpoint / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llama"}))
    compare(checkpoint, transformers)
