"""Every family, imported: after this the registry is complete."""

from layerwise import allocate, describe, export, measure, run, score, search, slot
from layerwise.core.method import find, methods
from layerwise.edit import activation, rewrite, stack, weight

__all__ = [
    "activation",
    "allocate",
    "describe",
    "export",
    "find",
    "measure",
    "methods",
    "rewrite",
    "run",
    "score",
    "search",
    "slot",
    "stack",
    "weight",
]
