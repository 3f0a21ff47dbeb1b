import json

import pytest

from mkdsl.engine import SamplingParams
from mkdsl.engine._chat_defaults import chat_defaults
from mkdsl.models import CheckpointError


@pytest.mark.parametrize(
    ("said", "params"),
    [
        (None, SamplingParams(temperature=0.7, top_p=0.95)),
        ({"eos_token_id": 2, "max_length": 20}, SamplingParams(temperature=0.7, top_p=0.95)),
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, SamplingParams(temperature=0.6, top_p=0.9)),
        ({"top_k": 20, "top_p": None, "min_p": 0.1}, SamplingParams(top_k=20, min_p=0.1)),
        ({"top_k": 0, "temperature": 1}, SamplingParams()),
        ({"repetition_penalty": 1.1, "temperature": 0.5, "unheard_of": {}}, SamplingParams(temperature=0.5, repetition_penalty=1.1)),
        ({"do_sample": False, "temperature": 0.6}, SamplingParams(temperature=0)),
    ],
)
def test_what_generation_config_says(tmp_path, said, params):
    if said is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert chat_defaults(tmp_path) == params


def test_what_is_outside_its_range(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 95}))
    with pytest.raises(CheckpointError, match=r"generation_config.json: top_p=95; it is more than 0 and at most 1; correct it, or remove"):
        chat_defaults(tmp_path)
