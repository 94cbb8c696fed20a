"""Measure: probes that look at every layer in one pass."""

from layerwise.measure.moments import second_moment, second_moment_diagonal
from layerwise.measure.residual import last_states, output_error, residual_cosine, update_norm

__all__ = [
    "last_states",
    "output_error",
    "residual_cosine",
    "second_moment",
    "second_moment_diagonal",
    "update_norm",
]
