import json

import pytest

from mkdsl.engine import load_tokenizer
from mkdsl.models import CheckpointError

USER = [{"role": "user", "content": "hé"}]


def test_plain_text_gets_its_beginning_token(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    tokens = tokenizer.encode("hé")
    assert tokens[0] == 256
    assert len(tokens) == 4  # é is two bytes
    assert "".join(tokenizer.stream(tokens)) == "hé"


def test_chat_follows_the_template(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    tokens = tokenizer.encode_chat(USER)
    assert tokens.count(256) == 1  # the template's own, no second one
    assert tokenizer.model.decode(tokens, skip_special_tokens=False) == "<s><user>hé<assistant>"  # blocks trimmed as Hugging Face does


@pytest.mark.parametrize("text", ["naïve café", "日本語", "😀 👩‍👩‍👧 end", "aà€😀", "", "\ufffd and on"])
def test_streaming_shows_whole_characters_only(checkpoint, text):
    tokenizer = load_tokenizer(checkpoint)
    pieces = list(tokenizer.stream(tokenizer.model.encode(text, add_special_tokens=False).ids))
    assert "".join(pieces) == text
    assert all(pieces)
    if "\ufffd" not in text:
        assert pieces == list(text)  # each as soon as its last byte is there


def test_streaming_ends_with_what_is_left(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    half = tokenizer.model.encode("ab€", add_special_tokens=False).ids[:-1]
    assert list(tokenizer.stream([*half, 257])) == ["a", "b", "\ufffd"]


def test_streaming_is_lazy(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    tokens = iter(tokenizer.encode("abc"))
    assert next(tokenizer.stream(tokens)) == "a"
    assert len(list(tokens)) == 2


def rewrite(checkpoint, **changed):
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return load_tokenizer(checkpoint)


def test_templates_by_name(checkpoint):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes{{ messages[0] | tojson }}"}]
    tokens = rewrite(checkpoint, chat_template=named).encode_chat(USER)
    assert "".join(load_tokenizer(checkpoint).stream(tokens)) == 'yes{"role": "user", "content": "hé"}'


def test_template_in_a_file_of_its_own(checkpoint):
    (checkpoint / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}{{ eos_token }}")
    (year,) = {"".join(load_tokenizer(checkpoint).stream(load_tokenizer(checkpoint).encode_chat(USER)))}
    assert len(year) == 4
    assert year.isdigit()


@pytest.mark.parametrize("template", [None, [{"name": "tool_use", "template": "no"}]])
def test_no_template(checkpoint, template):
    with pytest.raises(CheckpointError, match=r"has no chat template.*leave out --chat"):
        rewrite(checkpoint, chat_template=template).encode_chat(USER)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system prompt') }}", "no system prompt"),
        ("{{ messages[0].content.__class__.__mro__ }}{{ ''.__class__ }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages.append(1) }}", "not callable|unsafe|append"),
    ],
    ids=["its own", "sandbox", "syntax", "immutable"],
)
def test_templates_that_refuse(checkpoint, template, message):
    with pytest.raises(CheckpointError, match=f"chat template refuses this conversation .*({message})"):
        rewrite(checkpoint, chat_template=template).encode_chat(USER)


def test_no_tokenizer(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json: it is not there"):
        load_tokenizer(checkpoint)


def test_broken_tokenizer(checkpoint):
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: broken \(.*\); download it again"):
        load_tokenizer(checkpoint)


def test_the_config_beside_it_may_be_missing(checkpoint):
    (checkpoint / "tokenizer_config.json").unlink()
    assert load_tokenizer(checkpoint).specials == {}
