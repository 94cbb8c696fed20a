"""Score: from what was measured to how important each layer or group is."""

from layerwise.score.layers import (
    angular_distance,
    block_influence,
    layer_input_modification,
    removal,
    sensitivity,
    zscore_share,
)

__all__ = [
    "angular_distance",
    "block_influence",
    "layer_input_modification",
    "removal",
    "sensitivity",
    "zscore_share",
]
