"""A bar while weights are loaded."""

import contextlib
from collections.abc import Iterator

from mkdsl.models import Progress, extra


@contextlib.contextmanager
def loading_bar(what: str) -> Iterator[Progress]:
    """Shows on stderr, if that is a terminal, how much has been read: bytes, of how many, and how fast.

    Args:
      what: what is shown beside it, in few words: the numbers need room too.

    Yields:
      The `progress` of `Engine.load`.

    Raises:
      MissingExtra: rich is not installed.
    """
    with extra("hf"):
        import rich.console
        import rich.progress as parts
    console = rich.console.Console(stderr=True)
    label = parts.TextColumn("{task.description}", markup=False)
    columns = parts.SpinnerColumn(), label, parts.BarColumn(), parts.DownloadColumn(), parts.TransferSpeedColumn()
    with parts.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
