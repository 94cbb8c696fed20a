"""Search: choices that only evaluation can judge."""

from layerwise.search.greedy import greedy

__all__ = ["greedy"]
