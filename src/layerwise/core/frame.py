"""Frames around a matrix: what the steps of a chain see inside them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from layerwise.core.weight import Frame, Weight


def innermost(record: Weight) -> Weight:
    """What lies inside all frames."""
    while isinstance(record, Frame):
        record = record.inner
    return record


def put_inside(record: Weight, inner: Weight) -> Weight:
    """The same frames around something else."""
    if isinstance(record, Frame):
        return replace(record, inner=put_inside(record.inner, inner))
    return inner


def seen_inside(record: Weight, stats: Mapping[str, Any]) -> Mapping[str, Any]:
    """Statistics as they are inside all frames: moments of the inputs, and nothing else."""
    while isinstance(record, Frame):
        frame, record = record, record.inner
        square = {k: v for k, v in stats.items() if isinstance(v, Tensor) and v.ndim == 2}
        stats = {name: frame.moment(value) for name, value in square.items()}
    return stats
