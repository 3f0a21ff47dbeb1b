"""The GPU at hand."""

import jax

from mkdsl.schedule import PROFILES


def has_gpu() -> bool:
    """Whether JAX sees a CUDA GPU."""
    return jax.default_backend() == "gpu"


def require_gpu() -> None:
    """Raises RuntimeError where there is no GPU to run a kernel on."""
    if not has_gpu():
        raise RuntimeError(
            f"no GPU: jax's backend is {jax.default_backend()!r}; install mkdsl[cuda13] on a machine with one, run the kernel on the CPU with "
            "mk.jit(..., interpret=True), or run the decode step itself with jax.jit(jax.vmap(decode_step, (None, 0, 0, 0)))"
        )


def detect() -> str:
    """The profile of the GPU at hand; H200 where there is none, to search and interpret for.

    Raises:
      RuntimeError: the GPU has no profile.
    """
    if not has_gpu():
        return "H200"
    kind = jax.devices()[0].device_kind
    name = built_in(kind)
    if name is None:
        raise RuntimeError(
            f"no profile for {kind!r}; pass target=, one of {', '.join(PROFILES)}, a mkdsl.schedule.Profile, or a file that `mkdsl probe` wrote"
        )
    return name


def is_at_hand(name: str) -> bool:
    """Whether there is a GPU, and it is the one that the built-in profile of this name is of."""
    return has_gpu() and (built_in(jax.devices()[0].device_kind) or "").lower() == name.lower()


def built_in(kind: str) -> str | None:
    """The name of the built-in profile of a device kind such as "NVIDIA H200"."""
    words = kind.lower().replace("-", " ").split()
    return next((name for name in sorted(PROFILES, key=len, reverse=True) if name in words), None)
