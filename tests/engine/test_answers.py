"""How tokens become deltas, and deltas answers."""

import numpy as np
import pytest

from mkdsl.engine import Delta, Logprob, SamplingParams, answers
from mkdsl.engine._answers import Writer
from mkdsl.engine._sampler import Logprobs
from mkdsl.engine._text import Detokenizer

END = 257


@pytest.fixture
def writer(byte_tokenizer):
    return lambda **params: Writer(2, 1, SamplingParams(**params), Detokenizer(byte_tokenizer.decode))


@pytest.fixture
def tokens(byte_tokenizer):
    return lambda text: byte_tokenizer.encode(text, add_special_tokens=False).ids


def test_text_and_tokens_as_they_come(writer, tokens):
    write = writer().write
    said = tokens("a日b")
    first, taken = write(said[:2], None, ended=False, last=False)
    assert (first.prompt, first.choice, first.text, first.finish, taken) == (2, 1, "a", None, 2)
    second, _ = write(said[2:], None, ended=False, last=True)
    assert (second.text, second.finish) == ("日b", "length")
    assert (*first.tokens, *second.tokens) == tuple(said)


def test_an_end_token_is_not_shown_but_taken(writer, tokens):
    delta, taken = writer().write([*tokens("ab"), END], None, ended=True, last=False)
    assert (delta.text, delta.tokens, delta.finish, taken) == ("ab", tuple(tokens("ab")), "stop", 3)


def test_nothing_but_an_end_token(writer):
    delta, taken = writer().write([END], None, ended=True, last=True)
    assert (delta.text, delta.tokens, delta.finish, taken) == ("", (), "stop", 1)


def test_what_comes_after_a_stop_string_is_not_taken(writer, tokens):
    write = writer(stop=("bc",)).write
    first, _ = write(tokens("ab"), None, ended=False, last=False)
    second, taken = write(tokens("cde"), None, ended=False, last=False)
    assert (first.text, second.text, second.tokens, second.finish, taken) == ("a", "", tuple(tokens("c")), "stop", 1)


@pytest.mark.parametrize(("ended", "finish"), [(True, "stop"), (False, "length")])
def test_what_was_held_back_comes_in_the_end(writer, tokens, ended, finish):
    said = [*tokens("ab"), *[END] * ended]
    delta, _ = writer(stop=("bc",)).write(said, None, ended=ended, last=not ended)
    assert (delta.text, delta.finish) == ("ab", finish)


def test_half_a_character_in_the_end_completes_no_stop_string_unseen(writer, tokens):
    delta, _ = writer(stop=("b\ufffd",)).write([*tokens("ab"), tokens("日")[0]], None, ended=False, last=True)
    assert (delta.text, delta.finish) == ("a", "stop")


def test_logprobs_of_the_tokens_that_are_shown(writer, tokens):
    shape = (3, 20)
    top = np.broadcast_to(np.arange(20), shape)
    sampled = Logprobs(logprob=np.array([-1.0, -2.0, -3.0]), top_tokens=top, top_logprobs=-top.astype(float))
    delta, _ = writer(logprobs=2).write([*tokens("ab"), END], sampled, ended=True, last=False)
    assert delta.logprobs == tuple(
        Logprob(token=t, logprob=p, top=((0, 0.0), (1, -1.0))) for t, p in zip(tokens("ab"), (-1, -2), strict=True)
    )


def test_answers_of_deltas_in_any_order():
    def delta(prompt, choice, text, finish=None):
        return Delta(prompt=prompt, choice=choice, text=text, tokens=(len(text),), logprobs=(), finish=finish)

    said = [delta(1, 0, "c"), delta(0, 1, "b", "stop"), delta(0, 0, "a"), delta(1, 0, "d", "stop"), delta(0, 0, "aa", "length")]
    first, second = answers(said)
    assert [(answer.text, answer.finish, answer.tokens) for answer in first] == [("aaa", "length", (1, 2)), ("b", "stop", (1,))]
    assert [answer.text for answer in second] == ["cd"]
