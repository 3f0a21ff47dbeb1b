"""JSON files and their fields."""

import json
import os
import subprocess
import sys

import pytest
from tiny_checkpoint import LLAMA

from mkdsl.models import CheckpointError, read_config, read_json
from mkdsl.models._fields import Fields


@pytest.fixture
def fields(tmp_path):
    return Fields(tmp_path / "some.json", {"n": 3, "x": 0.5, "yes": True, "none": None, "many": [1, 2], "part": {"x": "1"}})


def test_each_reader_returns_what_it_is_named_for(fields):
    assert (fields.integer("n"), fields.number("n"), fields.number("x"), fields.flag("yes", False)) == (3, 3.0, 0.5, True)
    assert (fields.integer("other", 4), fields.number("other", 0.25), fields.flag("other", False)) == (4, 0.25, False)
    assert (fields.tokens("n", ()), fields.tokens("many", ()), fields.tokens("none", (5,)), fields.tokens("other", (5,))) == (
        (3,),
        (1, 2),
        (),
        (5,),
    )
    assert fields.section("none").values == fields.section("other").values == {}


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda f: f.integer("x"), r"some.json: x=0.5; it should be a positive integer below 2\*\*31"),
        (lambda f: f.integer("yes"), "some.json: yes=True; it should be a positive integer"),
        (lambda f: f.integer("other"), "some.json: has no other; it should be a positive integer"),
        (lambda f: f.number("yes"), "some.json: yes=True; it should be a positive number"),
        (lambda f: f.number("none", 1.0), "some.json: none=None; it should be a positive number"),
        (lambda f: f.flag("n", False), "some.json: n=3; it should be true or false"),
        (lambda f: f.tokens("part", ()), "some.json: part=.*; it should be a token's number, or a list of them"),
        (lambda f: f.section("many"), r"some.json: many=\[1, 2\]; it should be an object of parameters, or null"),
        (lambda f: f.section("part").number("x"), "some.json: part.x='1'; it should be a positive number"),
    ],
)
def test_each_refuses_by_file_field_and_value(fields, read, message):
    with pytest.raises(CheckpointError, match=message):
        read(fields)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", "0", "1e400", "1" + "0" * 400])
def test_numbers_that_are_none(tmp_path, value):
    (tmp_path / "some.json").write_text('{"x": ' + value + "}")
    with pytest.raises(CheckpointError, match="it should be a positive number"):
        Fields(tmp_path / "some.json", read_json(tmp_path / "some.json")).number("x")


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"some.json: it is not there; give the directory"):
        read_json(tmp_path / "some.json")
    with pytest.raises(CheckpointError, match=r"some.json: there is no such directory"):
        read_json(tmp_path / "nowhere" / "some.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", "holds a list"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not JSON"),
        (b'{"a": "\xe9"}', r"not UTF-8 \(.* at byte 7\); download it again"),
    ],
)
def test_a_broken_file(tmp_path, content, message):
    (tmp_path / "some.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "some.json")


def test_a_folder_where_a_file_should_be(tmp_path):
    (tmp_path / "some.json").mkdir()
    with pytest.raises(CheckpointError, match=r"some.json: cannot be read"):
        read_json(tmp_path / "some.json")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8-sig")
    assert read_config(tmp_path).hidden == LLAMA["hidden_size"]


def test_files_are_utf_8_whatever_the_locale(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"_name": "é日"}, ensure_ascii=False), encoding="utf-8")
    read = "import locale, sys, mkdsl.models; print(locale.getpreferredencoding(False), mkdsl.models.read_config(sys.argv[1]).hidden)"
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", read, str(tmp_path)], env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ANSI_X3.4-1968", str(LLAMA["hidden_size"])]
