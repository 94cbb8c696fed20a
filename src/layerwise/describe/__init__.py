"""Describe: from what was measured to figures for people."""

from layerwise.describe.geometry import spread, update_fit
from layerwise.describe.similarity import canonical, direct_match, similarity
from layerwise.describe.views import invariance

__all__ = ["canonical", "direct_match", "invariance", "similarity", "spread", "update_fit"]
