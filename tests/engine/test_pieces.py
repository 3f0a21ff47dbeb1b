"""How prompts are cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import LAW

from mkdsl.engine._pieces import LARGEST, SMALLEST, STALL, Pieces, covering, pieces_for, same
from mkdsl.models import SHAPES
from mkdsl.schedule import PROFILES

PIECES = Pieces(smallest=128, beside=512, alone=2048)


def cut(pieces, prompt, *, beside=False):
    lengths = []
    while sum(lengths) < prompt:
        lengths.append(pieces.next(prompt - sum(lengths), beside=beside))
    return lengths


def padded(pieces, length):
    return max(pieces.smallest, 1 << (length - 1).bit_length())


@LAW
@given(prompt=st.integers(1, 9000), beside=st.booleans())
def test_every_token_is_in_one_piece(prompt, beside):
    """At most a third of what is computed is more than the prompt, if that is not short; and pieces begin where pages do."""
    lengths = cut(PIECES, prompt, beside=beside)
    assert sum(lengths) == prompt
    assert max(lengths) <= (512 if beside else 2048)
    assert all(length % 64 == 0 for length in lengths[:-1])
    assert 3 * sum(padded(PIECES, length) for length in lengths) <= 4 * max(prompt, 384) + 3 * PIECES.smallest


@pytest.mark.parametrize(
    ("prompt", "beside", "lengths"),
    [
        (2048, False, [2048]),
        (2048, True, [512] * 4),
        (2047, False, [2047]),
        (5000, False, [2048, 2048, 904]),
        (1100, False, [1024, 76]),
        (700, False, [512, 188]),
        (300, False, [256, 44]),
        (130, False, [130]),
    ],
)
def test_pieces_of_a_prompt(prompt, beside, lengths):
    assert cut(PIECES, prompt, beside=beside) == lengths


@LAW
@given(prompt=st.integers(1, 3000), beside=st.booleans())
def test_pieces_that_depend_on_the_prompt_alone(prompt, beside):
    whole, rest = divmod(prompt, 512)
    assert cut(same(512), prompt, beside=beside) == [512] * whole + [rest] * (rest > 0)


@pytest.mark.parametrize("target", PROFILES.values(), ids=PROFILES)
@pytest.mark.parametrize("model", SHAPES)
def test_pieces_of_a_card(model, target):
    """Smaller for larger models and for slower cards; the numbers of an H200 are 512 for 8 billion weights, 2,048 for one."""
    pieces = pieces_for(SHAPES[model], target)
    assert SMALLEST == pieces.smallest <= pieces.beside <= pieces.alone == LARGEST
    assert pieces.beside.bit_count() == 1
    assert pieces.beside >= pieces_for(SHAPES["llama-3.1-8b"], target).beside
    assert pieces.beside <= pieces_for(SHAPES[model], PROFILES["b200"]).beside
    if target.name == "h200":
        assert pieces.beside == (512 if "8b" in model else 2048)
        assert STALL == 0.025


def test_pieces_without_a_card():
    assert pieces_for(SHAPES["llama-3.1-8b"], None) == Pieces(smallest=16, beside=512, alone=512)


@LAW
@given(pages=st.integers(0, 600), width=st.integers(1, 600))
def test_pages_that_a_piece_is_compiled_for(pages, width):
    covered = covering(pages, width)
    assert min(pages, width) <= covered <= width
    assert covered <= max(2, 4 * pages)


def test_few_numbers_of_pages():
    assert sorted({covering(pages, 128) for pages in range(129)}) == [2, 8, 32, 128]
    assert sorted({covering(pages, 47) for pages in range(48)}) == [2, 8, 32, 47]
