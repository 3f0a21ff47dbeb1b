"""Tiny Hugging Face checkpoints with random weights, and what a decoder computes on them in plain float32 numpy."""

import json
import math
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER, VOCAB = 32, 3, 4, 2, 48, 67
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": INNER,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "rope_scaling": LLAMA3,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN3 = LLAMA | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 16,  # heads * head_dim is not hidden
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "sliding_window": None,
    "use_sliding_window": False,
}


def head_dim(config):
    return config.get("head_dim", HIDDEN // HEADS)


def random_tensors(config, seed=0):
    """Random tensors under Hugging Face's names, in bf16."""
    rng, d = np.random.default_rng(seed), head_dim(config)

    def matrix(rows, columns):
        return (rng.standard_normal((rows, columns)) / math.sqrt(columns)).astype(ml_dtypes.bfloat16)

    def norm(n):
        return (1 + 0.3 * rng.standard_normal(n)).astype(ml_dtypes.bfloat16)

    tensors = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "model.norm.weight": norm(HIDDEN)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(VOCAB, HIDDEN)
    for i in range(LAYERS):
        layer = {
            "input_layernorm": norm(HIDDEN),
            "self_attn.q_proj": matrix(HEADS * d, HIDDEN),
            "self_attn.k_proj": matrix(KV_HEADS * d, HIDDEN),
            "self_attn.v_proj": matrix(KV_HEADS * d, HIDDEN),
            "self_attn.o_proj": matrix(HIDDEN, HEADS * d),
            "post_attention_layernorm": norm(HIDDEN),
            "mlp.gate_proj": matrix(INNER, HIDDEN),
            "mlp.up_proj": matrix(INNER, HIDDEN),
            "mlp.down_proj": matrix(HIDDEN, INNER),
        }
        if config["model_type"] == "qwen3":
            layer |= {"self_attn.q_norm": norm(d), "self_attn.k_norm": norm(d)}
        tensors |= {f"model.layers.{i}.{name}.weight": value for name, value in layer.items()}
    return tensors


def write(directory: pathlib.Path, config, tensors, *, shards=1):
    """Writes a checkpoint directory, in so many files."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    places = {name: names[i % shards] for i, name in enumerate(tensors)}
    for shard in names:
        save_file({name: tensors[name] for name, place in places.items() if place == shard}, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return directory


def forward(config, tensors, tokens):
    """Logits [tokens, vocab] of the whole sequence at once, in float32, written from Hugging Face's definition of both families."""
    t = {name: value.astype(np.float32) for name, value in tensors.items()}
    x = t["model.embed_tokens.weight"][tokens]
    for i in range(LAYERS):
        p = {name.split(f"layers.{i}.")[1]: value for name, value in t.items() if f"layers.{i}." in name}
        x = x + _attention(config, p, _rms(config, x, p["input_layernorm.weight"]))
        h = _rms(config, x, p["post_attention_layernorm.weight"])
        gate = h @ p["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p["mlp.up_proj.weight"].T)) @ p["mlp.down_proj.weight"].T
    return _rms(config, x, t["model.norm.weight"]) @ t.get("lm_head.weight", t["model.embed_tokens.weight"]).T


def _attention(config, p, h):
    n, d = len(h), head_dim(config)
    q = (h @ p["self_attn.q_proj.weight"].T).reshape(n, HEADS, d)
    k = (h @ p["self_attn.k_proj.weight"].T).reshape(n, KV_HEADS, d)
    v = (h @ p["self_attn.v_proj.weight"].T).reshape(n, KV_HEADS, d)
    if "self_attn.q_norm.weight" in p:
        q, k = _rms(config, q, p["self_attn.q_norm.weight"]), _rms(config, k, p["self_attn.k_norm.weight"])
    cos, sin = _rotary(config, n)
    q, k = (a * cos + np.concatenate([-a[..., d // 2 :], a[..., : d // 2]], -1) * sin for a in (q, k))
    k, v = (np.repeat(a, HEADS // KV_HEADS, axis=1) for a in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(d)
    scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(n, HEADS * d) @ p["self_attn.o_proj.weight"].T


def _rms(config, x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weight


def _rotary(config, positions):
    """cos and sin, [positions, 1, head_dim]."""
    d, s = head_dim(config), config["rope_scaling"]
    frequencies = []
    for i in range(d // 2):
        f = config["rope_theta"] ** (-2 * i / d)
        if s is not None:
            wavelength = 2 * math.pi / f
            low, high, old = s["low_freq_factor"], s["high_freq_factor"], s["original_max_position_embeddings"]
            if wavelength > old / low:
                f = f / s["factor"]
            elif wavelength >= old / high:
                smooth = (old / wavelength - low) / (high - low)
                f = (1 - smooth) * f / s["factor"] + smooth * f
        frequencies.append(f)
    angle = np.arange(positions)[:, None] * np.array(frequencies + frequencies)
    return np.cos(angle).astype(np.float32)[:, None], np.sin(angle).astype(np.float32)[:, None]
