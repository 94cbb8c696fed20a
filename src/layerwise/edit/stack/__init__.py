"""Edits of the execution order."""

from layerwise.edit.stack.collapse import collapse
from layerwise.edit.stack.drop import drop
from layerwise.edit.stack.loop import recur, side_by_side
from layerwise.edit.stack.tie import tie

__all__ = ["collapse", "drop", "recur", "side_by_side", "tie"]
