"""How long a context is, and which prompts it has room for."""

import dataclasses

import pytest

from mkdsl.engine import ContextError, Engine, PromptError
from mkdsl.engine._context import check_prompt, positions
from mkdsl.models import CheckpointError


@pytest.mark.parametrize(("made_for", "context"), [(256, 256), (200, 192), (4096, 2048), (50, 50), (10**9, 2048)])
def test_default_context(shape, made_for, context):
    assert positions(dataclasses.replace(shape, max_context=made_for)) == context


@pytest.mark.parametrize("context", [0, 257])
def test_context_the_model_was_not_made_for(checkpoint, context):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ContextError, match=f"a context of {context} positions; it may have 1 to 256"):
        Engine.load(checkpoint, context=context)


@pytest.mark.parametrize(
    ("length", "max_tokens", "message"),
    [
        (60, 5, "takes 60 tokens of a context of 64, and 5 more are asked for; ask for at most 4 or give a longer context .*256 positions"),
        (64, None, "takes 64 tokens of a context of 64, and nothing is left for an answer; shorten the prompt or give a longer"),
        (300, 1, "takes 300 tokens of a context of 64"),
    ],
)
def test_prompts_that_it_has_no_room_for(shape, length, max_tokens, message):
    with pytest.raises(ContextError, match=message):
        check_prompt(shape, 64, [1] * length, max_tokens)


def test_no_prompt(shape):
    with pytest.raises(PromptError, match="the prompt has no tokens; give at least one"):
        check_prompt(shape, 64, [], None)


@pytest.mark.parametrize(("length", "max_tokens"), [(63, 1), (63, None), (1, 63)])
def test_exactly_as_many_as_fit(shape, length, max_tokens):
    check_prompt(shape, 64, [1] * length, max_tokens)


def test_no_longer_context_is_offered_than_there_is(shape):
    with pytest.raises(ContextError, match=r"ask for at most 6$"):
        check_prompt(shape, 256, [1] * 250, 7)


def test_another_models_tokenizer(shape):
    with pytest.raises(CheckpointError, match="token 260 lies past the vocabulary of 260; the tokenizer is another model's"):
        check_prompt(shape, 64, [1, 260], None)
