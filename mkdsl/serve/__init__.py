"""A server that speaks OpenAI's interface in front of an engine. Comes in: HTTP. Goes out: HTTP. It knows the engine's public names only."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mkdsl.engine import Engine
from mkdsl.engine import main as command
from mkdsl.models import extra

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["create_app", "main"]


def create_app(engine: Engine, *, model: str, api_key: str | None = None, max_open: int) -> "FastAPI":
    """The server as an ASGI application: what `mkdsl serve` runs, for whoever has an engine or an HTTP server of their own.

    Args:
      engine: answers; closing it is the caller's business.
      model: the name that it is known by.
      api_key: asked for by all paths but /health; None for no key.
      max_open: answers that are under way or wait at most; beyond, requests get 429.

    Returns:
      The application.

    Raises:
      MissingExtra: fastapi or prometheus-client is not installed.
    """
    with extra("serve"):
        from mkdsl.serve._app import application
    return application(engine, model=model, api_key=api_key, max_open=max_open)


def main() -> None:
    """The `mkdsl` command, with `mkdsl serve`."""
    command(_command)


def _command() -> Callable[..., None]:
    from mkdsl.serve._cli import serve

    return serve
