"""A server that speaks OpenAI's interface in front of an engine. Comes in: HTTP. Goes out: HTTP. It knows the engine's public names only."""

from collections.abc import Callable

from mkdsl import engine

__all__ = ["main"]


def main() -> None:
    """The `mkdsl` command, with `mkdsl serve`."""
    engine.main(_command)


def _command() -> Callable[..., None]:
    from mkdsl.serve._cli import serve

    return serve
