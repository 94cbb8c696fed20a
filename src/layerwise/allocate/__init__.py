"""Allocate: what each group gets within one budget."""

from layerwise.allocate.choose import knapsack, threshold, uniform

__all__ = ["knapsack", "threshold", "uniform"]
