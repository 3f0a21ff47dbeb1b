"""What a model needs compiled, as calls that need not be made to be compiled."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a function `jax.jit(kept(f), ..)`. Of arrays in args, or `jax.ShapeDtypeStruct`s to compile only."""

    jitted: Any
    args: tuple[Any, ...]
    static: dict[str, Any]

    def __call__(self) -> Any:
        return self.jitted(*self.args, **self.static)

    def compile(self) -> None:
        """Compiles it for JAX's default backend; a call of the same shapes finds that."""
        self.jitted.lower(*self.args, **self.static).compile()

    def export(self, platform: str) -> bool:
        """Traces and lowers it for a platform, and keeps that on disk. Returns whether it was there already."""
        return self.jitted.__wrapped__.exported(*self.args, platform=platform, **self.static)[1]


def side_by_side[T, R](do: Callable[[T], R], things: Iterable[T]) -> list[R]:
    """Does something with each, in threads. Tracing holds Python's lock, but XLA's and Mosaic's compilers do not."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(do, things))
