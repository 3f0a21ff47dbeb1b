"""How prompts are cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import LAW

from mkdsl.engine._pages import PagePool
from mkdsl.engine._pieces import LARGEST, LONG, SMALLEST, covering, next_piece, pieces_for
from mkdsl.engine._scheduler import Prefill, Scheduler
from mkdsl.models import SHAPES
from mkdsl.schedule import PROFILES


def cut(prompt, most):
    lengths = []
    while sum(lengths) < prompt:
        lengths.append(next_piece(prompt - sum(lengths), most))
    return lengths


@LAW
@given(prompt=st.integers(1, 9000), most=st.sampled_from([128, 512, 1024, 2048]))
def test_every_token_is_in_one_piece(prompt, most):
    """Of what is computed of a long prompt a quarter is pads at most, beside its end; and pieces begin where pages do."""
    lengths = cut(prompt, most)
    assert sum(lengths) == prompt
    assert max(lengths) <= most
    assert all(length % 64 == 0 for length in lengths[:-1])
    padded = [1 << (length - 1).bit_length() for length in lengths]
    assert all(4 * length > 3 * computed or computed < LONG for length, computed in zip(lengths, padded, strict=True))


@pytest.mark.parametrize(
    ("prompt", "most", "lengths"),
    [
        (2048, 2048, [2048]),
        (2048, 512, [512] * 4),
        (2047, 2048, [2047]),
        (5000, 2048, [2048, 2048, 904]),
        (1100, 2048, [1024, 76]),
        (700, 2048, [512, 188]),
        (300, 512, [300]),
        (1300, 512, [512, 512, 276]),
        (5, 4, [4, 1]),
    ],
)
def test_pieces_of_a_prompt(prompt, most, lengths):
    assert cut(prompt, most) == lengths


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


@LAW
@given(pages=st.integers(0, 600), width=st.integers(1, 600))
def test_pages_that_a_piece_is_compiled_for(pages, width):
    covered = covering(pages, width)
    assert min(pages, width) <= covered <= width
    assert covered <= max(1, 4 * pages)


def test_few_numbers_of_pages():
    assert sorted({covering(pages, 128) for pages in range(129)}) == [1, 4, 16, 64, 128]
    assert sorted({covering(pages, 47) for pages in range(48)}) == [1, 4, 16, 47]


def test_pieces_are_shorter_while_somebody_runs():
    scheduler = Scheduler(PagePool(count=40, size=4), max_batch=2, piece=16, beside=8, steps=1)
    scheduler.submit((1,) * 21, 5)
    alone = [scheduler.next() for _ in range(2)]
    assert [part.stop - part.start for step in alone for part in step.parts] == [16, 4]
    scheduler.submit((2,) * 21, 5)
    steps = [scheduler.next() for _ in range(6)]
    assert [part.stop - part.start for step in steps if isinstance(step, Prefill) for part in step.parts] == [8, 8, 4]
