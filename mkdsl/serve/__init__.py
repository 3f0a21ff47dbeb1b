"""A server that speaks OpenAI's interface in front of an engine. Comes in: HTTP. Goes out: HTTP. It knows the engine's public names only."""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mkdsl.engine import main as command
from mkdsl.models import extra
from mkdsl.serve._routing import Routes, prompt_of

if TYPE_CHECKING:
    from mkdsl.serve._app import create_app
    from mkdsl.serve._metrics import merged_metrics
    from mkdsl.serve._relay import assembled, plain_scope, relayed

__all__ = ["Routes", "assembled", "create_app", "main", "merged_metrics", "plain_scope", "prompt_of", "relayed"]

_BY_THE_EXTRA = {
    "assembled": "_relay", "create_app": "_app", "merged_metrics": "_metrics", "plain_scope": "_relay", "relayed": "_relay",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """What needs the extra `serve` is imported when it is asked for. Raises MissingExtra if it is not installed."""
    if name not in _BY_THE_EXTRA:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    with extra("serve"):
        return getattr(importlib.import_module(f"{__name__}.{_BY_THE_EXTRA[name]}"), name)


def main() -> None:
    """The `mkdsl` command, with `mkdsl serve`."""
    command(_command)


def _command() -> Callable[..., None]:
    from mkdsl.serve._cli import serve

    return serve
