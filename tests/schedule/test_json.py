"""Dataclasses out of JSON that somebody edited: what does not fit is refused by name."""

import dataclasses
import re

import pytest

from mkdsl.schedule._json import parse


@dataclasses.dataclass(frozen=True)
class Box:
    name: str
    count: int
    weight: float
    size: tuple[int, int]
    curve: tuple[tuple[float, float], ...] = ()


GOOD = {"name": "a", "count": 2, "weight": 1, "size": [3, 4]}


def test_lists_become_tuples_and_defaults_are_filled_in():
    assert parse(Box, GOOD, "box") == Box("a", 2, 1, (3, 4))
    assert parse(Box, GOOD | {"curve": [[0, 1.5], [2, 3]]}, "box").curve == ((0, 1.5), (2, 3))


def test_a_dataclass_goes_through_and_comes_back():
    box = Box("a", 2, 0.5, (3, 4), ((0.0, 1.5),))
    assert parse(Box, dataclasses.asdict(box), "box") == box


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 1}, "box: name is 1, not str"),
        ({"count": 2.0}, "box: count is 2.0, not int"),
        ({"count": True}, "box: count is True, not int"),
        ({"count": -1}, "box: count is -1, negative or not finite"),
        ({"weight": True}, "box: weight is True, not a number"),
        ({"weight": float("inf")}, "box: weight is inf, negative or not finite"),
        ({"weight": float("nan")}, "box: weight is nan, negative or not finite"),
        ({"size": 3}, "box: size is 3, not a list"),
        ({"size": [3]}, "box: size has 1 items, not 2: [3]"),
        ({"size": [3, "4"]}, "box: size[1] is '4', not int"),
        ({"curve": {"8": 0.3}}, "box: curve is {'8': 0.3}, not a list"),
        ({"curve": [[0, 1], [1, None]]}, "box: curve[1][1] is None, not a number"),
        ({"colour": "green"}, "box: unknown colour"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(Box, GOOD | changes, "box")


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="box: missing count, weight"):
        parse(Box, {"name": "a", "size": [3, 4]}, "box")


@pytest.mark.parametrize("data", [[], "text", 3, None])
def test_what_is_no_object(data):
    with pytest.raises(ValueError, match="box: a JSON object is needed, not"):
        parse(Box, data, "box")
