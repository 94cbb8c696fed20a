"""GPTQ: round column by column and let the columns that remain make up for it."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import method
from layerwise.core.weight import Quantized
from layerwise.edit.weight._grid import Grid, check_bits, fit_grid, round_column
from layerwise.edit.weight.rtn import quantized


@method("weight", paper="arXiv:2210.17323", needs=("second_moment",))
def gptq(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    bits: int = 4,
    group: int = 128,
    symmetric: bool = True,
    order: bool = True,
    shrink: bool = False,
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
        shrink: search a smaller range per group for the least error.
        damping: `d` as a share of the mean of the diagonal.

    Returns:
        A `Quantized` record, columns in their own order.

    Raises:
        LayerwiseError: `bits` or `group` are out of range.

    Example:
        >>> w, h = torch.tensor([[0.6, 0.6, 3.0, -4.0]]), torch.eye(4)
        >>> h[0, 1] = h[1, 0] = 0.5
        >>> q = gptq(w, {"second_moment": h}, bits=3, symmetric=False, order=False, damping=0.0)
        >>> q.dense()
        tensor([[ 1.,  0.,  3., -4.]])

    Reference: Frantar et al., 2022, arXiv:2210.17323. The factor is found without inverting `H`,
    and blocks are as wide as groups, so that the width of a block changes nothing.
    """
    check_bits("gptq", bits, group)
    columns = weight.shape[1]
    moment = stats.get("second_moment")
    hessian = torch.eye(columns, device=weight.device) if moment is None else moment.float().clone()
    work = weight.float().clone()
    dead = hessian.diagonal() <= 0
    # not 1, as in the authors' code: the damping would depend on the scale of the inputs
    hessian.diagonal()[dead] = hessian.diagonal()[~dead].mean().nan_to_num(1.0)
    work[:, dead] = 0.0
    sequence = torch.arange(columns, device=weight.device)
    if order:
        sequence = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[sequence][:, sequence], damping)
    grid = fit_grid(work, bits, group, symmetric, shrink, weight.dtype)
    # Scales and zeros are read column by column: lay columns out in one piece.
    grid = grid._replace(scale=grid.scale.T.contiguous().T, zero=grid.zero.T.contiguous().T)
    dynamic = bool(group) and not order
    codes = _feedback(
        work, factor, grid, sequence, _Refit(symmetric, shrink, weight.dtype, dynamic)
    )
    return quantized(codes, grid, group, symmetric, weight.dtype)


class _Refit:
    """Fits the grid of a group on the weights as they are when the group is reached."""

    def __init__(self, symmetric: bool, shrink: bool, dtype: torch.dtype, active: bool) -> None:
        self.symmetric, self.shrink, self.dtype, self.active = symmetric, shrink, dtype, active

    def __call__(self, grid: Grid, at: int, columns: Tensor) -> None:
        fitted = fit_grid(columns, grid.bits, 0, self.symmetric, self.shrink, self.dtype)
        grid.scale[:, at] = fitted.scale[:, 0]
        grid.zero[:, at] = fitted.zero[:, 0]


def inverse_factor(hessian: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """Upper triangular `U` with `U^T U = (H + d I)^-1`.

    From `J H J = L L^T`, `J` the reversal, `U = (J L J)^-1`: one Cholesky, one triangular
    inverse. Damping grows tenfold, then float64 is taken, where the matrix is not positive
    definite.

    Raises:
        LayerwiseError: no damping makes the matrix positive definite.
    """
    size = len(hessian)
    mean = hessian.diagonal().mean()
    for attempt in range(8):
        share = damping if attempt == 0 else (damping + 1e-3) * 10**attempt
        dtype = torch.float32 if attempt < 2 else torch.float64
        damped = hessian.to(dtype).flip(0, 1)
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
    else:
        raise LayerwiseError(
            "gptq, second_moment",
            allowed="finite numbers, symmetric and positive definite once damped",
            found=f"{hessian.isfinite().double().mean():.1%} finite, mean of diagonal {mean:.3g}",
            fix="calibrate on more or other text, or compute in float32",
        )
    upper = lower.flip(0, 1).contiguous()
    identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True).float()


def _feedback(
    work: Float[Tensor, "out in"], factor: Tensor, grid: Grid, sequence: Tensor, refit: _Refit
) -> Tensor:
    """Round in the given order, block by block, rows of the transposed matrix being columns."""
    columns = work.shape[1]
    flow = work.T[sequence].contiguous()  # [in, out], in the order of solving
    codes = torch.empty_like(flow, dtype=torch.int8)
    block = grid.group if refit.active else 128
    places = sequence.tolist()
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        if refit.active:
            refit(grid, start // grid.group, flow[start:stop].T)
        errors = torch.empty_like(flow[start:stop])
        for j in range(start, stop):
            found, value = round_column(flow[j], grid, places[j])
            codes[j] = found.to(torch.int8)
            error = (flow[j] - value) / factor[j, j]
            errors[j - start] = error
            flow[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        if stop < columns:
            flow[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    result = torch.empty_like(codes)
    result[sequence] = codes
    return result.T.contiguous()
