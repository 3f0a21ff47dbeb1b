"""What JAX traces and lowers, kept on disk by content, so that the next process does neither.

A function that is `kept` is exported when JAX first traces it: its StableHLO, with the kernels it calls in Mosaic's form, becomes a file, and what calls
it calls that. The name of the file is a digest of all that the export depends on, and is known without tracing. JAX keeps what XLA and ptxas
make of it (`keep_executables`). So there is one path, whether the file was there or has just been made: the same StableHLO, the same executable,
the same bits.
"""

import contextlib
import dataclasses
import enum
import functools
import importlib.metadata
import logging
import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.mosaic.gpu  # it says where Mosaic's runtime lies, which a kernel that is kept needs like any other
import jax.extend
import numpy as np
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface
from jax._src.custom_partitioning import custom_partitioning_p
from jax._src.lib import cuda_versions
from jax.interpreters import mlir

from mkdsl.gpu._assemble import lowering_for
from mkdsl.gpu._device import has_gpu
from mkdsl.search import digest, directory, discard, read, source_digest, write

VERSIONS = [importlib.metadata.version(name) for name in ("jax", "jaxlib")]
ROOT = pathlib.Path(__file__).parents[1]
FLAGS = (  # of JAX's, those that change what a function is traced or lowered to
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
)
ANY_CALL = jax.export.DisabledSafetyCheck.custom_call("ALL")  # cuDNN's too: JAX says nothing of its next versions, but the key has this one
log = logging.getLogger("mkdsl")


class NoContentError(TypeError):
    """A value says nothing of itself that another process would understand, as a function does not."""


def content(value: Any) -> str:
    """A value as text that no other value has: numbers, strings, tuples, and mkdsl's own dataclasses and enumerations of such, whose source the key has.

    Raises:
      NoContentError: it is something else.
    """
    match value:
        case Kept():
            return value.content
        case enum.Enum() if _ours(value):
            return f"{type(value).__module__}.{value}"
        case None | bool() | int() | float() | str() | bytes() if type(value).__module__ == "builtins":
            return f"{type(value).__name__} {value!r}"
        case tuple() if type(value) is tuple:
            return f"({', '.join(map(content, value))},)"
    if not dataclasses.is_dataclass(value) or isinstance(value, type) or not _ours(value):
        raise NoContentError(f"a {type(value).__module__}.{type(value).__qualname__} has no content that another process could know")
    fields = (f"{f.name}={content(getattr(value, f.name))}" for f in dataclasses.fields(value) if f.compare)
    return f"{type(value).__module__}.{type(value).__qualname__}({', '.join(fields)})"


def identity(*parts: Any) -> str:
    """A digest of some plain data together with all that it may have been made with: mkdsl's own source, and the versions of JAX."""
    return digest(repr((parts, source_digest(ROOT), VERSIONS)).encode())


def _surroundings() -> str:
    device = jax.devices()[0]
    return repr((device.device_kind, device.client.platform_version, cuda_versions and cuda_versions.cudnn_get_version()))


def _ours(value: Any) -> bool:
    return type(value).__module__.split(".")[0] == "mkdsl"


class Kept:
    """See `kept`. f: the function itself; content: it, as text; emitted: modules of the kernels that this process had to emit for it."""

    def __init__(self, f: Callable[..., Any], content: str, capability: tuple[int, int] | None, local: bool) -> None:
        functools.update_wrapper(self, f)
        self.f, self.content, self._capability, self._local = f, content, capability, local
        self.emitted: tuple[bytes, ...] = ()
        self._known: dict[str, jax.export.Exported] = {}
        self._lock = threading.RLock()  # two threads that want the same wait for one

    def __call__(self, *args: Any, **static: Any) -> Any:
        try:
            exported, _ = self.exported(*args, **static)
        except NoContentError:
            return self.f(*args, **static)
        return exported.call(*args)

    def exported(self, *args: Any, platform: str | None = None, **static: Any) -> tuple[jax.export.Exported, bool]:
        """The function as it was exported for such arguments, and whether it was there already.

        Args:
          args: arrays, jax.ShapeDtypeStruct or what JAX traces with, in pytrees.
          platform: "cpu" or "cuda"; if None, "cuda" for a kernel, and for others that of JAX's default backend.
          static: the rest, of which `content` must know the content.

        Raises:
          NoContentError: it does not.
        """
        platform = platform or ("cuda" if self._capability else jax.export.default_export_platform())
        avals = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
        key = self._key(avals, static, platform)
        with self._lock:
            there = self._known.get(key) or _load(key)
            self._known[key] = there or self._export(key, avals, static, platform)
            return self._known[key], there is not None

    def _key(self, avals: Any, static: dict[str, Any], platform: str) -> str:
        flags = [(flag, getattr(jax.config, flag)) for flag in FLAGS]
        leaves = [(a.shape, str(a.dtype)) for a in jax.tree.leaves(avals)]
        where = _surroundings() if self._local else None
        return identity(
            self.content, content(tuple(sorted(static.items()))), platform, flags, str(jax.tree.structure(avals)), leaves, where
        )

    def _export(self, key: str, avals: Any, static: dict[str, Any], platform: str) -> jax.export.Exported:
        log.info("tracing %s", getattr(self.f, "__name__", type(self.f).__name__))
        absent = None if has_gpu() else self._capability
        with contextlib.nullcontext({}) if absent is None else lowering_for(absent) as modules:
            jitted = jax.jit(self.f, static_argnames=tuple(static))
            export = jax.export.export(
                jitted, platforms=[platform], disabled_checks=[ANY_CALL], _override_lowering_rules=((custom_partitioning_p, _whole),)
            )
            exported = export(*avals, **static)
        self.emitted = tuple(modules.values())
        if private(directory("exported")):
            write(_path(key), bytes(exported.serialize()))
        return exported


def _whole(ctx: Any, *values: Any, call: Any, **_: Any) -> Any:
    """How what may be partitioned, as cuDNN's attention, is lowered for one device: whole. JAX's own rule asks for the device, which an export has not."""
    return mlir.lower_fun(jax.extend.core.jaxpr_as_fun(call), multiple_results=True)(ctx, *values)


def kept(f: Callable[..., Any], *, of: Any = None, capability: tuple[int, int] | None = None, local: bool = False) -> Kept:
    """A function as it was exported, by this process or an earlier one. To be called while JAX traces: `jax.jit(kept(f), static_argnames=..)`.

    Args:
      f: f(*args, **static), of pytrees of arrays and of what is static. A function of a module of mkdsl's, or with `of` any.
      of: what says the same as the function, as `content` takes it; of a function in a module that is its name.
      capability: of a kernel, the compute capability of the GPU that it is for.
      local: what it is lowered to depends on the device and on CUDA's libraries, as where cuDNN is asked whether it takes something.

    Raises:
      NoContentError: nothing says what the function is.
    """
    if of is None and not f.__module__.startswith("mkdsl."):
        raise NoContentError(f"{f.__module__}.{f.__qualname__} is not mkdsl's, whose source is known: say by of=... what it is")
    return Kept(f, content((f.__module__, f.__qualname__) if of is None else of), capability, local)


def record[T](cls: type[T]) -> type[T]:
    """Makes a dataclass of arrays a pytree that JAX takes and returns, also of what is exported."""
    registered: Any = jax.tree_util.register_dataclass(cls)
    name = f"{cls.__module__}.{cls.__qualname__}"
    jax.export.register_pytree_node_serialization(
        registered, serialized_name=name, serialize_auxdata=lambda _: b"", deserialize_auxdata=lambda _: ()
    )
    return registered


def committed(tree: Any) -> Any:
    """Arrays that are bound to JAX's default device, as what an exported function returns is: JAX compiles once more for those that are not."""
    return jax.device_put(tree, here())


def here() -> jax.sharding.Sharding:
    """Where JAX's default device has its arrays."""
    return jax.device_put(np.int32(0)).sharding


class Executables(CacheInterface):
    """What JAX compiles, in files that are there whole or not at all: JAX's own cache writes them in place, and never repairs one."""

    def __init__(self) -> None:
        self._path = directory("xla")

    def get(self, key: str) -> bytes | None:
        path = self._path / key
        return read(path) if path.exists() and private(self._path) else None

    def put(self, key: str, value: bytes) -> None:
        if private(self._path):
            write(self._path / key, value)


def keep_executables() -> None:
    """Has JAX keep what it compiles from here on, in this process, beside what else is kept; unless it has been told to keep it elsewhere."""
    if jax.config.jax_compilation_cache_dir is None:
        compilation_cache._cache = Executables()  # JAX has no public word for another kind of cache
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def private(folder: pathlib.Path) -> bool:
    """Whether a folder, made if need be, is this user's or root's, and no other may write to it: what lies there is run."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except OSError as error:
        log.info("nothing is kept in %s: %s", folder, error)
        return False
    if about.st_uid in (os.geteuid(), 0) and not about.st_mode & 0o022:
        return True
    _warn_of(folder)
    return False


@functools.cache  # once
def _warn_of(folder: pathlib.Path) -> None:
    log.warning("%s is not used: others may write to it, and what lies there is run; chmod 700 it, or set MKDSL_CACHE", folder)


def _path(key: str) -> pathlib.Path:
    return directory("exported") / f"{key}.jax"


def _load(key: str) -> jax.export.Exported | None:
    """What was exported under a key, if it is there and JAX understands it."""
    path = _path(key)
    found = read(path) if path.exists() and private(path.parent) else None
    if found is None:
        return None
    try:
        return jax.export.deserialize(bytearray(found))
    except Exception as error:  # of whatever kind: JAX says nothing of what it raises here
        discard(path, f"{type(error).__name__}: {error}")
        return None
