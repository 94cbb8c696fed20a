"""Score: from what was measured to how important each layer or group is."""

from layerwise.score.experts import expert_saliency
from layerwise.score.groups import (
    fisher,
    interactions,
    linearity,
    sensitivity,
    trial_error,
)
from layerwise.score.layers import (
    angular_distance,
    block_influence,
    layer_input_modification,
    part_influence,
    removal,
    zscore_share,
)
from layerwise.score.ratios import directional_change, median_share, outlier_share

__all__ = [
    "angular_distance",
    "block_influence",
    "directional_change",
    "expert_saliency",
    "fisher",
    "interactions",
    "layer_input_modification",
    "linearity",
    "median_share",
    "outlier_share",
    "part_influence",
    "removal",
    "sensitivity",
    "trial_error",
    "zscore_share",
]
