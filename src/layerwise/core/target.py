"""What a target can hold, and what that costs in bytes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from layerwise.core.plan import Step
from layerwise.core.stack import Matrix


class Target(NamedTuple):
    """An export format as a planner sees it.

    `refuses` says why a matrix cannot take a chain there, or nothing; `nbytes` is the exact size
    of a matrix under a chain; `by_bits` tells whether fewer bits are fewer bytes.
    """

    name: str
    by_bits: bool
    refuses: Callable[[Matrix, nn.Module, Sequence[Step]], str | None]
    nbytes: Callable[[Matrix, Sequence[Step], int], int]
