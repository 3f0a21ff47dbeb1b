"""networkx, imported when the first graph is built: it takes 0.1 s, and a process that finds its kernels on disk builds none."""

from typing import Any


def __getattr__(name: str) -> Any:
    import networkx

    return getattr(networkx, name)
