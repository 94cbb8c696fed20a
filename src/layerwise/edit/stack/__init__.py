"""Edits of the execution order."""

from layerwise.edit.stack.drop import drop
from layerwise.edit.stack.loop import recur, side_by_side

__all__ = ["drop", "recur", "side_by_side"]
