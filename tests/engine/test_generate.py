import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mkdsl import engine, models
from mkdsl.engine import ContextError, LogitsError, _generate, _prefill, generate, load_model
from mkdsl.engine._generate import _checked
from mkdsl.models import CheckpointError

PROMPT = [256, 10, 20, 30, 40]


@pytest.fixture
def model(checkpoint):
    return load_model(checkpoint, context=64)


def greedy(model, prompt, count):
    """Token by token, the prompt too."""
    step, kv = jax.jit(models.decode_step(model.config)), models.init_cache(model.config, model.context)
    tokens = list(prompt)
    for pos in range(len(prompt) + count - 1):
        token, _, kv = step(model.params, kv, jnp.int32(tokens[pos]), jnp.int32(pos))
        tokens += [int(token)] if pos + 1 == len(tokens) else []
    return tokens[len(prompt) :]


@pytest.mark.medium
@pytest.mark.parametrize("length", [1, 2, 17, 40])
def test_equals_decoding_the_prompt_step_by_step(model, length):
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos=()), params=as_float32(model.params))
    prompt = np.random.default_rng(length).integers(0, 256, length).tolist()
    assert list(generate(model, prompt, max_tokens=12)) == greedy(model, prompt, 12)


def as_float32(params):
    return jax.tree.map(lambda a: a.astype(jnp.float32), params)


@pytest.mark.medium
def test_long_prompts_are_filled_in_pieces(model, monkeypatch):
    whole = fill(model, range(50))
    monkeypatch.setattr(_prefill, "LARGEST", 16)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.05), fill(model, range(50)), whole)


def fill(model, tokens):
    filled = _prefill.fill(model.config, model.params, models.init_cache(model.config, model.context), list(tokens))
    return jax.tree.map(lambda a: np.asarray(a, np.float32), filled)


def test_pads_write_nothing(model):
    filled = fill(model, range(50))
    assert all(a[:, :, :50].any(-1).all() and not a[:, :, 50:].any() for a in filled.values())


@pytest.mark.parametrize(
    ("length", "sizes"), [(0, []), (1, [16]), (16, [16]), (17, [32]), (512, [512]), (513, [512, 16]), (1500, [512, 512, 512])]
)
def test_pieces_are_powers_of_two(length, sizes):
    pieces = list(_prefill.pieces(range(length), 2048))
    assert [len(tokens) for tokens, _ in pieces] == sizes
    kept = [int(p) for _, positions in pieces for p in positions if p < 2048]
    assert kept == list(range(length))


@pytest.mark.medium
def test_one_compilation_per_piece_size(model, caplog):
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, eps=2e-5))  # shares no executable with other tests
    with jax.log_compiles():
        for length in (5, 9, 16, 17, 18):
            list(generate(model, list(range(length)), max_tokens=1))
    compiled = [record for record in caplog.messages if "Finished XLA compilation of jit(fill_piece)" in record]
    assert len(compiled) == 2  # 16 tokens and 32


def test_stops_at_the_end_token(model, scripted):
    model, steps = scripted(model, [5, 6, 257, 7])
    generation = generate(model, PROMPT, max_tokens=50)
    assert list(generation) == [5, 6]
    assert generation.report is not None
    assert generation.report.stopped == "eos"
    assert steps[:3] == [(40, 4), (5, 5), (6, 6)]
    assert len(steps) <= 4  # one ahead


@pytest.mark.medium
@pytest.mark.parametrize("eos", [(6,), (9, 6)])
def test_any_of_several_end_tokens(model, scripted, eos):
    model, _ = scripted(dataclasses.replace(model, config=dataclasses.replace(model.config, eos=eos)), [5, 6])
    assert list(generate(model, PROMPT)) == [5]


def test_stops_at_max_tokens(model, scripted):
    model, steps = scripted(model, [5])
    generation = generate(model, PROMPT, max_tokens=8)
    assert len(list(generation)) == 8 == len(steps)
    assert generation.report is not None
    assert (generation.report.stopped, generation.report.prefill_tokens, generation.report.decode_tokens) == ("max_tokens", 4, 7)


def test_stops_at_the_end_of_the_context(model, scripted):
    model, steps = scripted(model, [5])
    generation = generate(model, PROMPT)
    assert len(list(generation)) == 64 - len(PROMPT)
    assert generation.report is not None
    assert generation.report.stopped == "context"
    assert max(pos for _, pos in steps) < 64


def test_exactly_as_many_as_fit(model, scripted):
    model, _ = scripted(model, [5])
    assert len(list(generate(model, [1] * 63, max_tokens=1))) == 1


@pytest.mark.parametrize(
    ("length", "max_tokens", "message"),
    [
        (60, 5, "takes 60 tokens of a context of 64, and 5 more are asked for; ask for at most 4 or give a longer context .*256 positions"),
        (64, None, "takes 64 tokens of a context of 64, and nothing is left for an answer; shorten the prompt or give a longer"),
        (300, 1, "takes 300 tokens of a context of 64"),
        (0, None, "the prompt has no tokens"),
        (3, 0, "max_tokens=0; ask for at least one"),
    ],
)
def test_the_context_is_refused_before_anything_runs(model, scripted, length, max_tokens, message):
    model, steps = scripted(model, [5])
    with pytest.raises(ContextError, match=message):
        generate(model, [1] * length, max_tokens=max_tokens)
    assert not steps


def test_no_longer_context_is_offered_than_there_is(checkpoint):
    with pytest.raises(ContextError, match=r"ask for at most 6$"):
        generate(load_model(checkpoint), [1] * 250, max_tokens=7)


@pytest.mark.parametrize("context", [0, 257])
def test_context_the_model_was_not_made_for(checkpoint, context):
    with pytest.raises(ContextError, match=f"a context of {context} positions; it may have 1 to 256"):
        load_model(checkpoint, context=context)


@pytest.mark.parametrize(("made_for", "context"), [(256, 256), (200, 192), (4096, 2048), (50, 50), (10**9, 2048)])
def test_default_context(model, made_for, context):
    assert _generate.positions(dataclasses.replace(model.config, max_context=made_for)) == context


def test_a_tokenizer_that_is_there_is_not_loaded_again(checkpoint):
    tokenizer = engine.load_tokenizer(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    assert load_model(checkpoint, tokenizer=tokenizer).tokenizer is tokenizer


def test_another_models_tokenizer(model):
    with pytest.raises(CheckpointError, match="token 260 lies past the vocabulary of 260; the tokenizer is another model's"):
        generate(model, [1, 260])


@pytest.mark.medium
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [0, 3])
def test_logits_that_are_no_numbers_end_it(model, scripted, value, tokens):
    """A single one of them, wherever it is: the decoder's own token says nothing then."""
    model, _ = scripted(model, [5])
    said = model.decoder.step

    def step(params, kv, token, pos):
        token, logits, kv = said(params, kv, token, pos)
        logits[17] = value if pos == len(PROMPT) - 1 + tokens else 0
        return token, logits, kv

    model, shown = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, step=step)), []
    with pytest.raises(
        LogitsError, match=rf"the logits after {len(PROMPT) + tokens} tokens are NaN or infinite; .* download the checkpoint"
    ):
        shown += generate(model, PROMPT)
    assert shown == [] or shown == [5] * tokens


def test_weights_that_are_no_numbers(model):
    broken = dataclasses.replace(model, params=model.params | {"norm": model.params["norm"].at[3].set(jnp.nan)})
    with pytest.raises(LogitsError, match="the logits after 5 tokens"):
        list(generate(broken, PROMPT))


def test_one_number_comes_back_for_each_token(model, scripted, monkeypatch):
    """The check costs no copy of the logits to the host."""
    steps, read = scripted(model, [5])[0], []
    monkeypatch.setattr(_generate, "_checked", lambda token, logits: read.append(_checked(token, logits)) or read[-1])
    assert len(list(generate(steps, PROMPT, max_tokens=3))) == 3
    assert {r.shape for r in read} == {()}
