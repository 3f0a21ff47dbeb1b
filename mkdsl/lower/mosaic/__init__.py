"""What speaks Mosaic GPU: PTX that Pallas has no word for, register layouts, stores and copies."""

from mkdsl.lower.mosaic._layouts import ACC, grid
from mkdsl.lower.mosaic._ptx import SCALAR, Item, count_up, load_relaxed

__all__ = ["ACC", "SCALAR", "Item", "count_up", "grid", "load_relaxed"]
