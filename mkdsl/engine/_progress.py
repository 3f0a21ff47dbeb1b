"""A bar while weights are loaded."""

import contextlib
from collections.abc import Iterator

from mkdsl.models import Progress, extra


@contextlib.contextmanager
def loading_bar(what: str) -> Iterator[Progress]:
    """Shows on stderr, if that is a terminal, how much has been read: bytes, of how many, and how fast.

    Args:
      what: what is shown beside it.

    Yields:
      The `progress` of `Engine.load`.

    Raises:
      MissingExtra: rich is not installed.
    """
    with extra("hf"):
        import rich.console
        from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn
    console = rich.console.Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
