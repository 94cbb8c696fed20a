"""Train: what decides how fast each layer moves, and healing after an edit."""

from layerwise.train.healing import Healed, heal
from layerwise.train.turning import Layca, turned_step

__all__ = ["Healed", "Layca", "heal", "turned_step"]
