import pytest
from hypothesis import given
from hypothesis import strategies as st

from mkdsl.engine._pages import PagePool, digests


def names(*chain):
    return [str(name).encode() for name in chain]


def filled(pool, *chain):
    """Pages taken for a new sequence, with published content of these names."""
    assert pool.claim([], len(chain))
    pages = [pool.take() for _ in chain]
    for page, name in zip(pages, names(*chain), strict=True):
        pool.publish(page, name)
    return pages


def test_pages_are_taken_and_given_back():
    pool = PagePool(count=3, size=4)
    assert pool.claim([], 2)
    assert (pool.promised, pool.available) == (2, 3)
    page = pool.take()
    assert (pool.promised, pool.available, pool.holders(page)) == (1, 2, 1)
    pool.release([page], promised=1)
    assert (pool.promised, pool.available, pool.holders(page)) == (0, 3, 0)


def test_no_more_is_promised_than_there_is():
    pool = PagePool(count=3, size=4)
    assert pool.claim([], 2)
    assert not pool.claim([], 2)
    assert pool.claim([], 1)
    assert {pool.take() for _ in range(3)} == {0, 1, 2}


def test_what_was_not_promised_is_not_taken():
    with pytest.raises(AssertionError, match="not promised"):
        PagePool(count=3, size=4).take()


def test_a_prefix_is_found_while_it_is_held_and_after():
    pool = PagePool(count=4, size=4)
    pages = filled(pool, "a", "b")
    assert pool.find(names("a", "b", "c")) == pages
    pool.release(pages, 0)
    assert pool.find(names("a", "x")) == pages[:1]
    assert pool.find(names("b")) == pages[1:]  # digests are of the whole prefix: the chain sees to that
    assert pool.available == 4


def test_a_prefix_has_several_holders():
    pool = PagePool(count=4, size=4)
    pages = filled(pool, "a", "b")
    assert not pool.may_write(pages[0])  # published
    assert pool.claim(pages, 1)
    assert [pool.holders(page) for page in pages] == [2, 2]
    pool.release(pages, 0)
    assert pool.available == 2
    pool.release(pages, 1)
    assert pool.available == 4


def test_a_prefix_that_is_kept_counts_when_it_is_held_again():
    pool = PagePool(count=3, size=4)
    pool.release(filled(pool, "a", "b"), 0)
    shared = pool.find(names("a", "b"))
    assert not pool.claim(shared, 2)  # 2 of 3 are the prefix
    assert pool.promised == 0
    assert pool.claim(shared, 1)
    assert pool.take() not in shared


def test_the_least_recently_used_is_evicted_and_a_prefix_from_its_end():
    pool = PagePool(count=4, size=4)
    old, new = filled(pool, "a", "b"), filled(pool, "c", "d")
    pool.release(old, 0)
    pool.release(new, 0)
    assert pool.claim(old, 0)
    pool.release(old, 0)  # used again: now the other one is older
    assert pool.claim([], 4)
    assert [pool.take() for _ in range(4)] == [new[1], new[0], old[1], old[0]]
    assert not pool.find(names("a")) and not pool.find(names("c"))


def test_free_pages_come_before_those_kept():
    pool = PagePool(count=4, size=4)
    kept = filled(pool, "a")
    pool.release(kept, 0)
    assert pool.claim([], 3)
    assert kept[0] not in {pool.take() for _ in range(3)}


def test_content_that_is_there_twice_is_published_once():
    pool = PagePool(count=2, size=4)
    first, second = filled(pool, "a", "a")
    assert pool.find(names("a")) == [first]
    assert pool.may_write(second)
    pool.release([first, second], 0)
    assert (pool.available, pool.published) == (2, 1)


def test_what_is_lost_is_not_found():
    pool = PagePool(count=2, size=4)
    pool.release(filled(pool, "a"), 0)
    pool.forget()
    assert not pool.find(names("a"))
    assert pool.claim([], 2)
    assert {pool.take(), pool.take()} == {0, 1}


@given(st.lists(st.integers(0, 1), max_size=9), st.lists(st.integers(0, 1), max_size=9), st.integers(1, 4))
def test_digests_are_equal_where_all_tokens_so_far_are(a, b, size):
    for i, (x, y) in enumerate(zip(digests(a, size), digests(b, size), strict=False)):
        assert (x == y) == (a[: (i + 1) * size] == b[: (i + 1) * size])
    assert len(list(digests(a, size))) == len(a) // size


@given(st.lists(st.integers(0, 300), min_size=6, max_size=12))
def test_a_chain_goes_on(tokens):
    first = list(digests(tokens[:4], 2))
    assert [*first, *digests(tokens[4:], 2, first[-1])] == list(digests(tokens, 2))
