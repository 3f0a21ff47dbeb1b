"""How prompts are cut: pieces as large as the card is efficient with, but while somebody's answer runs no longer than that may stand still."""

import dataclasses
from collections.abc import Iterator

import jax

from mkdsl.models import DecoderConfig, abstract_params
from mkdsl.schedule import Profile

STALL = 0.025  # seconds that a running answer may wait for a piece of another's prompt
LARGEST = 2048  # tokens: more would gain little, and what a layer computes of them takes memory
SMALLEST = 128  # tokens: fewer take as long, as all weights are read for them
PACKED = 256  # tokens: what several short prompts take together, pads and all, while one would be padded to the half
LONG = 1024  # tokens: two pieces of half as many are hardly slower
SHARE = 0.5  # of a card's rate that a piece reaches, about
PER_CYCLE = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192}  # bfloat16 operations of a multiprocessor in a clock (public)
OTHERS_PER_CYCLE = 512  # 8.6 and 8.9; some of them do twice as many
GROWTH = 4  # from one number of pages that pieces are compiled for to the next


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pieces:
    """Lengths of pieces, in tokens, powers of two.

    Attributes:
      smallest: what is shorter is padded to it; others are padded to a power of two.
      beside: at most, while somebody's answer runs.
      alone: at most, while nobody's does; no less.
      packed: in all the short prompts that are written together; 0 where none are.
    """

    smallest: int
    beside: int
    alone: int
    packed: int = 0


def pieces_for(config: DecoderConfig, target: Profile) -> Pieces:
    """The pieces of a model's prompts on a GPU."""
    weights = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)["layers"]) if leaf.ndim == 3)
    rate = SHARE * target.workers * target.clock_hz * PER_CYCLE.get(target.capability, OTHERS_PER_CYCLE)
    tokens = max(SMALLEST, min(LARGEST, int(STALL * rate / (2 * weights))))
    return Pieces(smallest=SMALLEST, beside=1 << (tokens.bit_length() - 1), alone=LARGEST, packed=PACKED)


def next_piece(unfilled: int, most: int) -> int:
    """How many of a prompt's tokens are written next, at most so many. Where over a quarter of a long piece would be pads, it is two."""
    length = min(unfilled, most)
    padded = row(length)
    return padded // 2 if padded >= LONG and 4 * length <= 3 * padded else length


def row(longest: int, packed: int = 0, most: int = 1) -> int:
    """Positions that each prompt gets in a piece, the longest of which has so many tokens. In a packed one at most so many prompts are together."""
    return max(1 << (longest - 1).bit_length(), packed // most)


def powers(first: int, last: int) -> Iterator[int]:
    """first, twice as many, and so on up to `last`."""
    while first <= last:
        yield first
        first *= 2


def covering(pages: int, width: int) -> int:
    """The pages that a piece is compiled for, where so many are filled of a table that has `width`: few numbers, so that little is compiled."""
    covered = 1
    while covered < pages:
        covered *= GROWTH
    return min(covered, width)
