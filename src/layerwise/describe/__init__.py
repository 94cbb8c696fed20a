"""Describe: from what was measured to figures for people."""

from layerwise.describe.geometry import spread, update_fit
from layerwise.describe.lens import lens, tuned_lens, voids
from layerwise.describe.similarity import canonical, direct_match, similarity
from layerwise.describe.views import invariance
from layerwise.describe.weights import rotation, spectrum

__all__ = [
    "canonical",
    "direct_match",
    "invariance",
    "lens",
    "rotation",
    "similarity",
    "spectrum",
    "spread",
    "tuned_lens",
    "update_fit",
    "voids",
]
