"""Chat templates, held against what transformers renders."""

import json

import pytest

from mkdsl.engine import load_tokenizer
from mkdsl.models import CheckpointError

USER = [{"role": "user", "content": "hé <b>"}]
NAMED = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes{{ messages[0] | tojson }}"}]


def rewrite(checkpoint, **changed):
    path = checkpoint / "tokenizer_config.json"
    about = {"bos_token": "<s>", "eos_token": "</s>"}
    path.write_text(json.dumps(about | changed))
    return load_tokenizer(checkpoint)


TEMPLATES = {
    "tools is not none": "{% if tools is not none %}{{ tools | length }} tools{% endif %}{% if tools is none %}no tools{% endif %}",
    "tools is defined": "{% if tools is defined %}defined{% endif %}{% if not tools %}, empty{% endif %}",
    "documents": "{% if documents is not none %}{{ documents[0] }}{% else %}none{% endif %}",
    "generation": "{% for m in messages %}{% generation %}\n {{ m.content }}{% endgeneration %}{% endfor %}",
    "a variable set in generation": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "generation with spaces": "a {%- generation -%} {{ messages[0].content }} {%- endgeneration -%} b",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ messages[0] | tojson(true, none, (',', ':'), true) }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}",
    "loop controls": "{% for x in range(9) %}{% if x == 3 %}{% break %}{% endif %}{{ x }}{% endfor %}",
    "trimmed blocks": "{% if true %}\n   {% if true %}\nx\n   {% endif %}\n{% endif %}\n",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_as_transformers(checkpoint, transformers_of, template):
    ours = rewrite(checkpoint, chat_template=template)
    assert ours.encode_chat(USER) == transformers_of(checkpoint).apply_chat_template(USER, add_generation_prompt=True)["input_ids"]


PLACES = {
    "by name": ({"tokenizer_config.json": NAMED}, 'yes{"role": "user", "content": "hé <b>"}'),
    "chat_template.jinja": ({"chat_template.jinja": "é {{ eos_token }}jinja", "tokenizer_config.json": "config"}, "é jinja"),
    "the config before chat_template.json": ({"tokenizer_config.json": "config", "chat_template.json": "old"}, "config"),
}


@pytest.mark.parametrize(("places", "text"), PLACES.values(), ids=PLACES)
def test_where_a_template_is(checkpoint, transformers_of, places, text):
    ours = place(checkpoint, places)
    tokens = ours.encode_chat(USER)
    assert tokens == transformers_of(checkpoint).apply_chat_template(USER)["input_ids"]
    assert "".join(ours.stream(tokens)) == text


@pytest.mark.parametrize("old", ["old", {"default": "old", "tool_use": "no"}, [{"name": "default", "template": "old"}]])
def test_in_chat_template_json(checkpoint, old):
    """Which transformers' processors read, and its tokenizers do not: they have no template then."""
    ours = place(checkpoint, {"chat_template.json": old})
    assert "".join(ours.stream(ours.encode_chat(USER))) == "old"


def place(checkpoint, places):
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    for name, template in places.items():
        if name.endswith(".jinja"):
            (checkpoint / name).write_text(template, encoding="utf-8")
            continue
        about = json.loads((checkpoint / name).read_text()) if (checkpoint / name).exists() else {}
        (checkpoint / name).write_text(json.dumps(about | {"chat_template": template}))
    return load_tokenizer(checkpoint)


def test_the_time(checkpoint):
    ours = rewrite(checkpoint, chat_template="{{ strftime_now('%Y') }}")
    year = "".join(ours.stream(ours.encode_chat(USER)))
    assert len(year) == 4
    assert year.isdigit()


@pytest.mark.parametrize("template", [None, [{"name": "tool_use", "template": "no"}], ["no"]])
def test_no_template(checkpoint, template):
    with pytest.raises(CheckpointError, match=r"has no chat template.*give it plain text: mkdsl generate without --chat"):
        rewrite(checkpoint, chat_template=template).encode_chat(USER)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system prompt') }}", "no system prompt"),
        ("{{ messages[0].content.__class__.__mro__ }}{{ ''.__class__ }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
        ("{% generation %}", "endgeneration"),
        ("{{ messages.append(1) }}", "not callable|unsafe|append"),
    ],
    ids=["its own", "sandbox", "syntax", "no end", "immutable"],
)
def test_templates_that_refuse(checkpoint, template, message):
    with pytest.raises(CheckpointError, match=f"chat template refuses this conversation .*({message})"):
        rewrite(checkpoint, chat_template=template).encode_chat(USER)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ range(1000000) | length }}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        (5, "TypeError|AttributeError"),
    ],
)
def test_templates_that_fail(checkpoint, template, message):
    with pytest.raises(CheckpointError, match=rf"chat template fails on this conversation \(({message}).*\); correct the template"):
        rewrite(checkpoint, chat_template=template).encode_chat(USER)


def test_without_jinja2(checkpoint, monkeypatch):
    for name in [n for n in __import__("sys").modules if n == "mkdsl.engine._chat_template"]:
        monkeypatch.delitem(__import__("sys").modules, name)
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'the package jinja2 is not installed: pip install "mkdsl\[hf\]"'):
        load_tokenizer(checkpoint).encode_chat(USER)
