"""Every family, imported: after this the registry is complete."""

from layerwise import allocate, export, measure, score, search
from layerwise.edit import stack, weight

__all__ = ["allocate", "export", "measure", "score", "search", "stack", "weight"]
