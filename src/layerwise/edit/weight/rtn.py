"""Round to nearest."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.method import method
from layerwise.core.weight import Quantized
from layerwise.edit.weight._grid import Grid, check_bits, fit_grid, round_to_grid


@method("weight", aliases=("round_to_nearest",), by_rows=True)
def rtn(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    bits: int = 4,
    group: int = 128,
    symmetric: bool = True,
    shrink: bool = False,
) -> Quantized:
    """Round every weight to the nearest point of its group's grid.

    Args:
        weight: `[out, in]`.
        stats: not used.
        bits: 2 to 8.
        group: columns that share a scale; the last group may be shorter; 0 for the whole row.
        symmetric: no zero points.
        shrink: search a smaller range per group for the least error.

    Returns:
        A `Quantized` record in which scales have the dtype of the weight.

    Raises:
        LayerwiseError: `bits` or `group` are out of range.

    Example:
        >>> rtn(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), {}, bits=2, symmetric=False).dense()
        tensor([[0., 1., 2., 3.]])
    """
    check_bits("rtn", bits, group)
    grid = fit_grid(weight, bits, group, symmetric, shrink, weight.dtype)
    return quantized(round_to_grid(weight, grid), grid, group, symmetric, weight.dtype)


def quantized(
    codes: Tensor, grid: Grid, group: int, symmetric: bool, dtype: torch.dtype
) -> Quantized:
    """The record of codes on a grid."""
    zero = None if symmetric else grid.zero.to(torch.int8).contiguous()
    return Quantized(codes, grid.scale.to(dtype).contiguous(), zero, grid.bits, group)
