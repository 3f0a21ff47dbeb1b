"""Text streamed from tokens, of both kinds of tokenizer, and up to stop strings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from mkdsl.engine._text import Detokenizer, StopStrings

ALPHABET = "ab ,é日😀\n"


@pytest.fixture(scope="session")
def sentencepiece():
    """As Llama 2's: spaces are ▁, one is put before a text and dropped from it again, and what has no token is bytes."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", ",", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    model = Tokenizer(BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(steps)
    model.add_special_tokens([AddedToken("<s>", special=True)])
    return model


@pytest.fixture(params=["byte-level", "sentencepiece"])
def model(request, byte_tokenizer, sentencepiece):
    return byte_tokenizer if request.param == "byte-level" else sentencepiece


def encoded(model, text):
    return model.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", ["a ab, b", " a", "  a  b ", "", " ", "é日😀", "a 日b\n", "日 日"])
def test_pieces_are_the_whole(model, text):
    detokenizer = Detokenizer(model.decode)
    tokens = encoded(model, text)
    pieces = [detokenizer.feed([token]) for token in tokens]
    assert "".join(pieces) + detokenizer.finish() == model.decode(tokens) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(before=st.text(ALPHABET, min_size=1, max_size=12), text=st.text(ALPHABET, max_size=12))
@pytest.mark.parametrize("kind", ["byte_tokenizer", "sentencepiece"])
def test_a_text_goes_on_where_its_prompt_ends(request, kind, before, text):
    model = request.getfixturevalue(kind)
    tokens = encoded(model, before + text)
    for cut in range(1, len(tokens)):
        prompt, answer = tokens[:cut], tokens[cut:]
        detokenizer = Detokenizer(model.decode, after=prompt)
        pieces = [detokenizer.feed([token]) for token in answer]
        shown = model.decode(prompt)
        if not shown.endswith("\ufffd"):
            assert shown + "".join(pieces) + detokenizer.finish() == before + text
            assert not any("\ufffd" in piece for piece in pieces)


def test_the_first_word_keeps_its_space(sentencepiece):
    prompt, answer = encoded(sentencepiece, "ab,"), encoded(sentencepiece, "ab")
    assert sentencepiece.decode(answer) == "ab"
    assert Detokenizer(sentencepiece.decode, after=prompt).feed(answer) == " ab"
    assert Detokenizer(sentencepiece.decode, after=[1]).feed(answer) == "ab"  # after the beginning of a text


def test_several_tokens_at_once(model):
    tokens = encoded(model, "a 日b")
    assert Detokenizer(model.decode).feed(tokens) == "a 日b"


def test_half_a_character_at_the_end(byte_tokenizer):
    detokenizer = Detokenizer(byte_tokenizer.decode)
    assert detokenizer.feed(encoded(byte_tokenizer, "ab€")[:-1]) == "ab"
    assert detokenizer.finish() == "\ufffd"


def test_a_prompt_that_ends_within_a_character(byte_tokenizer):
    tokens = encoded(byte_tokenizer, "€b")
    assert Detokenizer(byte_tokenizer.decode, after=tokens[:1]).feed(tokens[1:]).endswith("b")


@pytest.mark.parametrize(
    ("strings", "pieces", "shown"),
    [
        (["end"], ["the e", "n", "d of it"], ["the ", "", ""]),
        (["end"], ["the e", "n", "ergy"], ["the ", "", "energy"]),
        (["end"], ["ene", "nd"], ["en", ""]),
        (["aab"], ["aaa", "ab"], ["a", "a"]),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""]),
        (["abcd", "bc"], ["xabcd"], ["xa"]),  # the one that ends first
        (["bcd", "abcd"], ["xabcd"], ["x"]),  # of two that end together, the longer one
        ([], ["a", "b"], ["a", "b"]),
    ],
)
def test_text_up_to_a_stop_string(strings, pieces, shown):
    stops = StopStrings(strings)
    assert [stops.feed(piece) for piece in pieces] == shown
    assert stops.found == any(string in "".join(pieces) for string in strings)


def test_what_was_held_back_is_shown_in_the_end():
    stops = StopStrings(["end"])
    assert (stops.feed("an en"), stops.finish(), stops.finish()) == ("an ", "en", "")
    assert not stops.found


def test_nothing_follows_a_stop_string():
    stops = StopStrings(["end"])
    assert (stops.feed("the end of"), stops.feed(" it"), stops.finish()) == ("the ", "", "")


def up_to(text, strings):
    """Character by character."""
    for end in range(len(text) + 1):
        if at := [end - len(string) for string in strings if text[:end].endswith(string)]:
            return text[: min(at)]
    return text


@given(
    strings=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("abc", max_size=5), max_size=6),
)
def test_stop_strings_are_found_however_the_text_is_cut(strings, pieces):
    stops, shown = StopStrings(strings), ""
    for piece in pieces:
        shown += stops.feed(piece)
        assert not any(string in shown for string in strings)
    text = "".join(pieces)
    assert shown + stops.finish() == up_to(text, strings)
    assert stops.found == any(string in text for string in strings)
