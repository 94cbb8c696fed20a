"""Describe: from what was measured to figures for people."""

from layerwise.describe.boundary import Boundary, logistic_boundary
from layerwise.describe.combine import combinations, layer_weights
from layerwise.describe.effects import skip_effect, task_match
from layerwise.describe.erase import erasure, fit_effect, integrated_gradients
from layerwise.describe.geometry import dataset_entropy, spread, update_fit
from layerwise.describe.labels import probe, truncation
from layerwise.describe.lens import lens, tuned_lens, voids
from layerwise.describe.neurons import pruning, specialisation
from layerwise.describe.similarity import canonical, direct_match, similarity
from layerwise.describe.topics import topics
from layerwise.describe.views import invariance
from layerwise.describe.weights import rotation, spectrum

__all__ = [
    "Boundary",
    "canonical",
    "combinations",
    "dataset_entropy",
    "direct_match",
    "erasure",
    "fit_effect",
    "integrated_gradients",
    "invariance",
    "layer_weights",
    "lens",
    "logistic_boundary",
    "probe",
    "pruning",
    "rotation",
    "similarity",
    "skip_effect",
    "specialisation",
    "spectrum",
    "spread",
    "task_match",
    "topics",
    "truncation",
    "tuned_lens",
    "update_fit",
    "voids",
]
