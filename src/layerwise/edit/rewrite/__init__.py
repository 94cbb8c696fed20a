"""Edits that keep the function: they are folded into the weights before anything is solved."""

from layerwise.edit.rewrite.rotation import principal_axes, rotate_stream
from layerwise.edit.rewrite.scale import awq, smoothquant

__all__ = ["awq", "principal_axes", "rotate_stream", "smoothquant"]
