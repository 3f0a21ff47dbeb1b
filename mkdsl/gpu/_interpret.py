"""Room for interpreted kernels.

Pallas's interpreter runs every warpgroup of every worker as a thread, and a thread that waits at a barrier may hold one of the XLA CPU
client's pool, which has one per core: on two cores a few that wait keep out the one they wait for, and the process sleeps for ever. XLA
reads the size of its pool once, when JAX's first backend is made, from PJRT_NPROC.
"""

import os
import warnings

from jax._src import xla_bridge  # jax.extend has no word for whether a backend is there, short of making one

POOL = 512  # threads: two per worker of the largest GPU, and some more


def make_room() -> bool:
    """Asks for a pool that no interpreted kernel can exhaust; False if JAX has made its pool already, from fewer cores than that."""
    if not xla_bridge.backends_are_initialized():
        os.environ.setdefault("PJRT_NPROC", str(POOL))
    return int(os.environ.get("PJRT_NPROC", os.cpu_count() or 1)) >= POOL


ROOM = make_room()


def require_room() -> None:
    """Warns that an interpreted kernel may never end."""
    if not ROOM:
        warnings.warn(
            f"mk.jit(..., interpret=True) may sleep for ever: JAX made its CPU thread pool, of one thread per core, before mkdsl was imported; "
            f"import mkdsl first, or set PJRT_NPROC={POOL}",
            RuntimeWarning,
            stacklevel=3,
        )
