"""Which values a request may have."""

import dataclasses
import math

import pytest

from mkdsl.engine import SamplingError, SamplingParams


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", -0.1, r"temperature=-0.1; it is 0, which takes the most likely token, or a positive number"),
        ("temperature", math.nan, "temperature=nan"),
        ("temperature", "1", "temperature='1'"),
        ("top_k", 0, "top_k=0; it is None, or an integer of at least 1"),
        ("top_k", 2.0, "top_k=2.0"),
        ("top_p", 0, "top_p=0; it is more than 0 and at most 1"),
        ("top_p", 1.01, "top_p=1.01"),
        ("min_p", -1, "min_p=-1; it is between 0 and 1"),
        ("repetition_penalty", 0, "repetition_penalty=0; it is a number from 1e-6 to 1e6, 1 for no penalty"),
        ("presence_penalty", math.inf, "presence_penalty=inf; it is a number from -1e6 to 1e6"),
        ("frequency_penalty", None, "frequency_penalty=None; it is a number from -1e6 to 1e6"),
        ("logit_bias", {-1: 1.0}, "logit_bias={-1: 1.0}; it is a mapping of token ids to numbers from -1e6 to 1e6"),
        ("logit_bias", {1: math.inf}, "logit_bias={1: inf}"),
        ("logit_bias", {1: 1e308}, "to numbers from -1e6 to 1e6"),
        ("temperature", 1e308, "a positive number up to 1e6"),
        ("repetition_penalty", 1e-308, "repetition_penalty=1e-308"),
        ("logit_bias", [1], r"logit_bias=\[1\]"),
        ("seed", -1, r"seed=-1; it is None, or an integer from 0 to 2\*\*64 - 1"),
        ("seed", 1 << 64, "seed=18446744073709551616"),
        ("max_tokens", 0, "max_tokens=0; it is None, or an integer of at least 1"),
        ("max_tokens", True, "max_tokens=True"),
        ("stop", "end", "stop='end'; it is a tuple of strings, none of them empty"),
        ("stop", ("a", ""), "none of them empty"),
        ("stop_tokens", (1, -2), r"stop_tokens=\(1, -2\); it is a tuple of token ids"),
        ("logprobs", 21, "logprobs=21; it is None, or an integer from 0 to 20"),
        ("n", 0, "n=0; it is an integer of at least 1"),
    ],
)
def test_values_that_mean_nothing(name, value, message):
    with pytest.raises(SamplingError, match=message):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("top_k", 1),
        ("top_p", 1),
        ("min_p", 1),
        ("seed", (1 << 64) - 1),
        ("stop", ["a"]),
        ("logprobs", 0),
        ("logprobs", 20),
    ],
)
def test_values_at_the_border(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_a_changed_copy_is_checked_too():
    with pytest.raises(SamplingError, match="n=-1"):
        dataclasses.replace(SamplingParams(), n=-1)
