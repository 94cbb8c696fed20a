"""Train: what decides how fast each layer moves."""

from layerwise.train.turning import Layca, turned_step

__all__ = ["Layca", "turned_step"]
