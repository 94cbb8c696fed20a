"""Edits of the execution order."""

from layerwise.edit.stack.drop import drop

__all__ = ["drop"]
