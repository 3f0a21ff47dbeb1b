"""A tiny checkpoint whose tokenizer has one token for each byte, so that characters outside ASCII are several tokens."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from mkdsl import models
from mkdsl.engine._backend import Backend, Said
from mkdsl.models._checkpoint import _names

SHAPE = models.DecoderConfig(
    hidden=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    intermediate=48,
    vocab=260,
    eps=1e-5,
    theta=1e4,
    tied=True,
    max_context=256,
    bos=256,
    eos=(257,),
)
TEMPLATE = """{{ bos_token }}{% for m in messages %}
    {%- if m.role == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}
<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture(scope="session")
def shape():
    return SHAPE


@pytest.fixture(scope="session")
def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return tokenizer


@pytest.fixture
def checkpoint(tmp_path, byte_tokenizer):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": SHAPE.hidden,
        "num_hidden_layers": SHAPE.layers,
        "num_attention_heads": SHAPE.heads,
        "num_key_value_heads": SHAPE.kv_heads,
        "intermediate_size": SHAPE.intermediate,
        "vocab_size": SHAPE.vocab,
        "max_position_embeddings": SHAPE.max_context,
        "rms_norm_eps": SHAPE.eps,
        "rope_theta": SHAPE.theta,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    tensors = {}
    for path, stacked in jax.tree.leaves_with_path(models.random_params(SHAPE, jax.random.key(7))):
        names = _names(path[-1].key, SHAPE.layers)
        tensors |= dict(zip(names, np.asarray(stacked) if len(path) > 1 else np.asarray(stacked)[None], strict=True))
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    byte_tokenizer.save(str(directory / "tokenizer.json"))
    about = {"bos_token": {"__type": "AddedToken", "content": "<s>", "special": True}, "eos_token": "</s>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(about))
    return directory


@pytest.fixture(scope="session")
def transformers():
    """What our tokens and texts are held against. It takes seconds to import, but no torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")  # read once, on import
        import transformers
    return transformers


@pytest.fixture
def transformers_of(transformers):
    """transformers' tokenizer of a directory, as its tokenizer.json has it."""
    return transformers.PreTrainedTokenizerFast.from_pretrained


class Script:
    """Decode steps that say what is written, answer by answer (the last one again and again), whatever the weights are.

    Attributes:
      asked: (prompt, SamplingParams) of each answer, as they began.
      prefilled: (start, tokens) of each piece of a prompt.
    """

    def __init__(self, answers):
        self.answers, self.asked, self.prefilled = answers, [], []

    def occupy(self, backend, slot, *, params, seed, prompt, ends, max_tokens):
        self.asked.append((tuple(prompt), params))
        self.ends, self.said, self.left = set(ends), 0, max_tokens

    def prefill(self, backend, pieces):
        self.prefilled += [(piece.start, len(piece.tokens)) for piece in pieces]
        return jnp.zeros(())

    def decode(self, backend, lanes, *, batch):
        """Of one sequence; where it has ended nothing more is said."""
        (_,) = lanes
        answer, tokens = self.answers[min(len(self.asked), len(self.answers)) - 1], []
        while self.left and len(tokens) < backend._steps:
            tokens.append(answer[self.said % len(answer)])
            self.said, self.left = self.said + 1, 0 if tokens[-1] in self.ends else self.left - 1
        return types.SimpleNamespace(land=lambda: [Said(tokens=tokens, logprobs=None)])


@pytest.fixture
def scripted(monkeypatch, byte_tokenizer):
    """Makes all engines say some answers: text (with </s> where it ends) or token ids. Nothing is computed."""

    def replace(*answers):
        script = Script([byte_tokenizer.encode(a, add_special_tokens=False).ids if isinstance(a, str) else a for a in answers])
        for name in ("occupy", "prefill", "decode"):
            monkeypatch.setattr(Backend, name, functools.partialmethod(_called, getattr(script, name)))
        return script

    return replace


def _called(backend, does, *args, **options):
    return does(backend, *args, **options)
