"""What can be wrong with a checkpoint or an installation, said so that it can be put right."""

import contextlib
from collections.abc import Iterator

EXTRAS = {
    "hf": ("safetensors", "tokenizers", "jinja2", "rich", "typer", "gguf"),
    "serve": ("fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn"),
}


class CheckpointError(ValueError):
    """A checkpoint directory that cannot be used: the message names the file or tensor, and the remedy."""


class MissingExtra(ImportError):
    """A package is not installed that one of mkdsl's extras brings: the message says how to install it."""


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Wraps the import of a package that one of mkdsl's extras brings.

    Args:
      name: the extra, a key of EXTRAS.

    Raises:
      MissingExtra: the package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS[name]:
            raise
        raise MissingExtra(f'the package {package} is not installed: pip install "mkdsl[{name}]"', name=package) from error
