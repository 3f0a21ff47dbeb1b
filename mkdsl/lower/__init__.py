"""Schedule -> one Pallas Mosaic GPU kernel, and its per-phase form."""

from mkdsl.lower._operands import task_table
from mkdsl.lower._program import Program, lower

__all__ = ["Program", "lower", "task_table"]
