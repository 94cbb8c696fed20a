"""Edits of what matrices receive while a network runs."""

from layerwise.edit.activation.zeros import magnitude_threshold, top_k

__all__ = ["magnitude_threshold", "top_k"]
