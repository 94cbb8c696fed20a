"""Allocate: what each group gets within one budget."""

from layerwise.allocate.choose import knapsack, threshold, uniform, waterfill

__all__ = ["knapsack", "threshold", "uniform", "waterfill"]
