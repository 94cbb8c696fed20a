"""Run: how tokens are proposed by a part of a network, and which of them stay."""

from layerwise.run.accept import draw_from, same_choices, speculative_sample
from layerwise.run.drafts import early_exit, skip_steps
from layerwise.run.kernels import quicken
from layerwise.run.rows import few_rows

__all__ = [
    "draw_from",
    "early_exit",
    "few_rows",
    "quicken",
    "same_choices",
    "skip_steps",
    "speculative_sample",
]
