"""Intervene: see and change what is at any layer, part, position and head while a network runs."""

from layerwise.core.intervene import keeping
from layerwise.core.sites import At, Cache, Intervention, Runs, sites
from layerwise.intervene.sweeps import (
    activation_patching,
    attribution_patching,
    back_patching,
    moved,
)
from layerwise.intervene.verbs import ablate, add, patch, repeat, replace, scale, skip, stop

__all__ = [
    "At",
    "Cache",
    "Intervention",
    "Runs",
    "ablate",
    "activation_patching",
    "add",
    "attribution_patching",
    "back_patching",
    "keeping",
    "moved",
    "patch",
    "repeat",
    "replace",
    "scale",
    "sites",
    "skip",
    "stop",
]
