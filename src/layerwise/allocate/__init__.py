"""Allocate: what each group gets within one budget."""

from layerwise.allocate.choose import threshold, uniform, waterfill
from layerwise.allocate.exact import knapsack

__all__ = ["knapsack", "threshold", "uniform", "waterfill"]
