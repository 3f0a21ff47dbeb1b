"""Which of several servers is asked next."""

import collections
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mkdsl.serve import Routes, merged_metrics, prompt_of
from mkdsl.serve._routing import BLOCK, MOST

TEXTS = st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(lambda letters: "".join(letter * BLOCK for letter in letters))


@pytest.fixture
def routes():
    return Routes(slack=2)


def sent(routes, prompt, replicas):
    """Where a prompt goes, and stays."""
    first = routes.order(prompt, replicas)[0]
    routes.begun(first)
    return first


@given(st.lists(st.tuples(TEXTS, st.booleans()), max_size=20))
def test_all_are_named_once_and_nobody_has_too_many(asks):
    routes, under_way = Routes(slack=2), collections.Counter({0: 0, 1: 0, 2: 0})
    for prompt, ends in asks:
        order = routes.order(prompt, under_way)
        assert sorted(order) == [0, 1, 2]
        routes.begun(order[0])
        under_way[order[0]] += 1
        assert max(under_way.values()) - min(under_way.values()) <= 3
        if ends:
            routes.ended(order[0])
            under_way[order[0]] -= 1


@given(TEXTS, st.text(alphabet="c", max_size=BLOCK), st.lists(TEXTS, max_size=5))
def test_a_beginning_goes_where_it_was(prompt, more, others):
    routes = Routes(slack=2)
    first = sent(routes, prompt, "xyz")
    routes.ended(first)
    for other in others:
        if other[:BLOCK] != prompt[:BLOCK]:
            routes.ended(sent(routes, other, "xyz"))
    assert routes.order(prompt + more, "xyz")[0] == first


def test_without_a_beginning_the_one_that_has_waited_longest(routes):
    assert [sent(routes, "hello", "xyz") for _ in range(6)][:3] == ["x", "y", "z"]
    routes.ended("y")
    assert routes.order("hello", "xyz") == ["y", "x", "z"]


def test_a_new_one_does_not_get_all(routes):
    for _ in range(4):
        routes.ended(sent(routes, "hello", "xy"))
    got = []
    for _ in range(3):
        got.append(sent(routes, "hello", "xyz"))
        routes.ended(got[-1])
    assert sorted(got) == ["x", "y", "z"]


def test_not_where_it_is_much_busier(routes):
    prompt = "x" * BLOCK
    first = sent(routes, prompt, "xy")
    assert [sent(routes, prompt, "xy") == first for _ in range(3)] == [True, True, False]


def test_not_where_nobody_is_any_more(routes):
    prompt = "x" * BLOCK
    first = sent(routes, prompt, "xy")
    (left,) = {"x", "y"} - {first}
    assert routes.order(prompt, left) == [left]


def test_front_ends_agree():
    prompts = [f"{i}" * BLOCK for i in range(20)]
    first, second = ([Routes(slack=2).order(prompt, "xyz")[0] for prompt in prompts] for _ in range(2))
    assert first == second
    assert set(first) == {"x", "y", "z"}


def test_what_is_remembered_is_bounded(routes):
    for i in range(3):
        routes.order(f"{i}" * (BLOCK * MOST // 2), "xy")
    assert len(routes._seen) == MOST


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"{}", b"\xff", b'{"prompt": null}', json.dumps({"prompt": "hello"}).encode()])
def test_requests_of_all_kinds_have_a_prompt(body):
    assert isinstance(prompt_of(body), str)


def test_conversations_begin_as_their_beginnings():
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "what?"}]
    first, second = (prompt_of(json.dumps({"messages": turns[:n]}).encode()) for n in (1, 2))
    assert second.startswith(first[:-1])
    assert prompt_of(json.dumps({"prompt": "hello", "stream": True}).encode()) == "hello"
    assert prompt_of(json.dumps({"prompt": [1, 2]}).encode()) == "[1, 2]"


def test_one_page_of_metrics():
    pages = {name: f'# HELP r_total Requests.\n# TYPE r_total counter\nr_total{{path="/"}} {n}\n' for name, n in (("a", 1), ("b", 2))}
    assert merged_metrics(pages).decode().splitlines() == [
        "# HELP r_total Requests.", "# TYPE r_total counter", 'r_total{path="/",replica="a"} 1.0', 'r_total{path="/",replica="b"} 2.0',
    ]  # fmt: skip
