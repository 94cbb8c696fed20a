"""Intervene: see and change what is at any layer, part, position and head while a network runs."""

from layerwise.core.intervene import keeping
from layerwise.core.sites import At, Cache, Intervention, Runs, sites
from layerwise.intervene.verbs import ablate, add, patch, repeat, replace, scale, skip, stop

__all__ = [
    "At",
    "Cache",
    "Intervention",
    "Runs",
    "ablate",
    "add",
    "keeping",
    "patch",
    "repeat",
    "replace",
    "scale",
    "sites",
    "skip",
    "stop",
]
