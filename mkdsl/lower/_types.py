"""Names for what Pallas and Mosaic have no public types for."""

from typing import Any

type Index = Any  # an int32 that the kernel computes, or a Python int where it is known: an iteration, a unit of the ring, an item, a peer
type Ref = Any  # a Pallas reference to global or shared memory
type Buffer = Any  # shared memory or barriers to be allocated: plgpu.SMEM, plgpu.Barrier, plgpu.RefUnion
type Layout = Any  # which thread of a warpgroup holds which element
type Carry = Any  # what a loop hands on from one iteration to the next
type Value = Any  # a value of the DAG on a tile: an array, one number per row (`PerToken`), or a constant
type Context = Any  # of `plgpu.inline_mgpu`
