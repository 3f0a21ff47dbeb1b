"""Chat templates: where a checkpoint keeps its own, and rendering it as transformers does. Imported where it is used: it needs jinja2."""

import datetime
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mkdsl.models import CheckpointError


class Generation(jinja2.ext.Extension):
    """`{% generation %}` .. `{% endgeneration %}` marks what the assistant said, for training. The text is the same without."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own annotation)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def render(directory: pathlib.Path, template: str, values: Mapping[str, Any]) -> str:
    """A conversation's text. A template comes with the weights, from anywhere: hence the sandbox, and an error of any kind is its own.

    Raises:
      CheckpointError: the template refuses these values, or fails on them.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        return environment.from_string(template).render(values)
    except jinja2.TemplateError as error:
        raise CheckpointError(f"{directory}: its chat template refuses this conversation ({error})") from None
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{directory}: its chat template fails on this conversation ({what}); correct the template") from None


def to_json(x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Instead of jinja2's own, which escapes for HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
