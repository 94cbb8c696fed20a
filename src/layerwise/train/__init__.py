"""Train: what decides how fast each layer moves, and healing after an edit."""

from layerwise.train.healing import Healed, heal
from layerwise.train.regression import heal_layers
from layerwise.train.turning import Layca, turned_step

__all__ = ["Healed", "Layca", "heal", "heal_layers", "turned_step"]
