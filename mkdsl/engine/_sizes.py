"""The sizes that an engine's parts are made with: from the model, and from the GPU if there is one. Whoever builds ahead asks for the same."""

from typing import Any

import jax

from mkdsl.engine._backend import SMALLEST
from mkdsl.engine._decoder import Pool
from mkdsl.engine._paged import pages_that_fit
from mkdsl.engine._pieces import Pieces, pieces_for
from mkdsl.models import DecoderConfig, abstract_params
from mkdsl.schedule import Profile

PAGE = 128  # positions: half the longest block that attention is fastest with
PIECE = 512  # positions of a prompt written at once, where there is no GPU, or where it must be the same whoever else is there
STEPS = 4  # decode steps in one dispatch at most
HOST = 0.002  # seconds: longer than the host needs to begin a dispatch, so that as many steps as last so long keep the device busy


def pieces_of(config: DecoderConfig, gpu: Profile | None, *, batch_invariant: bool = False) -> Pieces:
    """How prompts are cut, on a GPU or without one."""
    if batch_invariant:
        return Pieces(smallest=PIECE, beside=PIECE, alone=PIECE)
    return pieces_for(config, gpu) if gpu else Pieces(smallest=SMALLEST, beside=PIECE, alone=PIECE)


def steps_of(config: DecoderConfig, gpu: Profile | None) -> int:
    """Decode steps in one dispatch: one without a GPU, and of a model that takes long for it; else they would keep those waiting who arrive."""
    seconds = HOST if gpu is None else sum(2 * leaf.size for leaf in jax.tree.leaves(abstract_params(config))) / gpu.bandwidth
    return next((n for n in (1, 2) if n * seconds >= HOST), STEPS)


def backend_options(
    config: DecoderConfig, pieces: Pieces, *, context: int, max_batch: int, free: int | None, gpu: Profile | None
) -> dict[str, Any]:
    """What an engine's backend is made with: `free` bytes on the device, if it says so; the GPU, if there is one."""
    pages = pages_that_fit(config, size=PAGE, context=context, max_batch=max_batch, free=free)
    sizes = {"pages": pages, "page_size": PAGE, "context": context, "max_batch": max_batch, "steps": steps_of(config, gpu)}
    return sizes | {"smallest": pieces.smallest, "packed": pieces.packed}


def pool_of(options: dict[str, Any]) -> Pool:
    """The pages of `backend_options`."""
    return Pool(count=options["pages"], size=PAGE, width=-(-options["context"] // PAGE))


def free_bytes() -> int | None:
    """Of the device's memory; None where it does not say, as a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats else None
