"""Measure: probes that look at every layer in one pass."""

from layerwise.measure.experts import expert_use
from layerwise.measure.geometry import document_geometry, position_parts, stream_moments
from layerwise.measure.importance import attention_received
from layerwise.measure.moments import (
    attended_moment,
    cross_moment,
    largest_magnitude,
    magnitude_quantiles,
    mean_magnitude,
    second_moment,
    second_moment_diagonal,
    stream_moment,
)
from layerwise.measure.residual import (
    depth_use,
    last_states,
    output_error,
    part_cosine,
    residual_cosine,
    update_norm,
)
from layerwise.measure.runtime import head_patterns, neuron_means
from layerwise.measure.states import (
    first_states,
    largest_states,
    place_states,
    pooled_states,
    token_sample,
)

__all__ = [
    "attended_moment",
    "attention_received",
    "cross_moment",
    "depth_use",
    "document_geometry",
    "expert_use",
    "first_states",
    "head_patterns",
    "largest_magnitude",
    "largest_states",
    "last_states",
    "magnitude_quantiles",
    "mean_magnitude",
    "neuron_means",
    "output_error",
    "part_cosine",
    "place_states",
    "pooled_states",
    "position_parts",
    "residual_cosine",
    "second_moment",
    "second_moment_diagonal",
    "stream_moment",
    "stream_moments",
    "token_sample",
    "update_norm",
]
