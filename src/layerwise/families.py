"""Every family, imported: after this the registry is complete."""

from layerwise import allocate, describe, export, measure, run, score, search
from layerwise.edit import stack, weight

__all__ = [
    "allocate",
    "describe",
    "export",
    "measure",
    "run",
    "score",
    "search",
    "stack",
    "weight",
]
