"""GPTQ: round column by column and let the columns that remain make up for it."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.method import method
from layerwise.core.weight import Quantized
from layerwise.edit.weight._grid import check_bits, fit_grid, round_column
from layerwise.edit.weight._solve import column_feedback, inverse_factor, prepared
from layerwise.edit.weight.rtn import quantized


@method("weight", paper="arXiv:2210.17323", needs=("second_moment",), by_rows=True)
def gptq(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    bits: int = 4,
    group: int = 128,
    symmetric: bool = True,
    order: bool = True,
    shrink: bool = True,
    damping: float = 0.01,
) -> Quantized:
    r"""Minimise `|| (W - Q) X ||_F^2` greedily, one column at a time.

    With `H = X X^T + d I` and `U` the upper Cholesky factor of its inverse, column `j` is rounded
    to `q_j` and `W[:, j:] -= (w_j - q_j) / U_jj * U[j, j:]`.

    Args:
        weight: `[out, in]`.
        stats: `second_moment` of the inputs, `[in, in]`; without it the identity is taken.
        bits: 2 to 8.
        group: columns that share a scale; the last group may be shorter; 0 for the whole row.
        symmetric: no zero points.
        order: columns with large inputs first, on grids fitted beforehand; else in order, the
            grid of a group being fitted when it is reached.
        shrink: search a smaller range per group for the least error, as the reference code can;
            without it the range spans all weights of the group.
        damping: `d` as a share of the mean of the diagonal.

    Returns:
        A `Quantized` record, columns in their own order.

    Raises:
        LayerwiseError: `bits` or `group` are out of range.

    Example:
        >>> w, h = torch.tensor([[0.6, 0.6, 3.0, -4.0]]), torch.eye(4)
        >>> h[0, 1] = h[1, 0] = 0.5
        >>> q = gptq(w, {"second_moment": h}, bits=3, symmetric=False, order=False,
        ...          shrink=False, damping=0.0)
        >>> q.dense()
        tensor([[ 1.,  0.,  3., -4.]])

    Reference: Frantar et al., 2022, arXiv:2210.17323. The factor is found without inverting `H`,
    and blocks are as wide as groups, so that the width of a block changes nothing.
    """
    check_bits("gptq", bits, group)
    work, hessian = prepared(weight, stats.get("second_moment"))
    sequence = torch.arange(weight.shape[1], device=weight.device)
    if order:
        sequence = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[sequence][:, sequence], damping, "gptq")
    grid = fit_grid(work, bits, group, symmetric, shrink, weight.dtype)
    # Scales and zeros are read column by column: lay columns out in one piece.
    grid = grid._replace(scale=grid.scale.T.contiguous().T, zero=grid.zero.T.contiguous().T)

    def refit(start: int, columns: Tensor) -> None:
        fitted = fit_grid(columns, bits, 0, symmetric, shrink, weight.dtype)
        grid.scale[:, start // group] = fitted.scale[:, 0]
        grid.zero[:, start // group] = fitted.zero[:, 0]

    dynamic = bool(group) and not order
    codes = column_feedback(
        work,
        factor,
        sequence,
        lambda values, place: round_column(values, grid, place),
        grid.group if dynamic else 128,
        refit if dynamic else None,
    )
    return quantized(codes.to(torch.int8), grid, group, symmetric, weight.dtype)
