"""Schedule -> one Pallas Mosaic GPU kernel, or one launch per phase.

In: a graph, a schedule by whomever, which is proven first, a profile. Out: a `Program`, traceable by JAX. Rooms: `mosaic` speaks Mosaic GPU,
`evaluate` evaluates tile functions, `phases` has a record for each kind of phase; here are the walk over the queue that the loader and compute
share, the ring, events, operands and the kernel. No model, shape or GPU is named, and the search is never imported.
"""

from mkdsl.lower._machine import Machine, zeros
from mkdsl.lower._operands import task_table
from mkdsl.lower._program import Program, lower
from mkdsl.lower._tile import Tile
from mkdsl.lower._waits import GivenUp, Wait, Wanted

__all__ = ["GivenUp", "Machine", "Program", "Tile", "Wait", "Wanted", "lower", "task_table", "zeros"]
