"""Allocate: what each group gets within one budget."""

from layerwise.allocate.choose import threshold, uniform, waterfill
from layerwise.allocate.exact import knapsack
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
