"""Allocate: what each group gets within one budget."""

from layerwise.allocate.choose import knapsack, threshold, uniform, waterfill
from layerwise.allocate.ratios import global_threshold, proportional, spread_ratios

__all__ = [
    "global_threshold",
    "knapsack",
    "proportional",
    "spread_ratios",
    "threshold",
    "uniform",
    "waterfill",
]
