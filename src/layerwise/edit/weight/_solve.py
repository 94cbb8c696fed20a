"""Solvers on `(W, H)`: whatever the grid, the error counted is `tr(E H E^T)`, `E = W - Q`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.core.errors import LayerwiseError

#: values `[out]` of a column and its place -> codes and the values that they stand for
RoundColumn = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def prepared(
    weight: Float[Tensor, "out in"], moment: Any
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "in in"]]:
    """Weight and moment in float32, inputs that are always 0 taken out: no weight, a mean moment.

    Not a moment of 1, as in the authors' code of GPTQ: the damping would depend on the scale of
    the inputs. Without a moment it is the identity.
    """
    hessian = torch.eye(weight.shape[1], device=weight.device)
    hessian = hessian if moment is None else moment.float().clone()
    work = weight.float().clone()
    dead = hessian.diagonal() <= 0
    hessian.diagonal()[dead] = hessian.diagonal()[~dead].mean().nan_to_num(1.0)
    work[:, dead] = 0.0
    return work, hessian


def mean_squares(stats: Mapping[str, Any]) -> Float[Tensor, " in"] | None:
    """Mean square of every input, by what is known of them; None where nothing is."""
    found = stats.get("second_moment_diagonal")
    if found is None and "second_moment" in stats:
        return stats["second_moment"].diagonal()
    return found


def must_be_moment(hessian: Float[Tensor, "in in"], name: str) -> None:
    """What costs little to know of a second moment: finite, and `H_ij^2 <= H_ii H_jj`.

    Raises:
        LayerwiseError: in the name of a method, it is none.
    """
    size = hessian.diagonal().clamp_min(0).sqrt()
    sound = hessian.isfinite() & (hessian.abs() <= 1.01 * size * size[:, None])
    if not sound.all():
        raise LayerwiseError(
            f"{name}, second_moment",
            allowed="finite numbers, none larger than those of the diagonal allow",
            found=f"{1 - sound.double().mean():.1%} that are not so",
            fix="calibrate on more or other text, or compute in float32",
        )


def inverse_factor(
    hessian: Float[Tensor, "in in"], damping: float, name: str
) -> Float[Tensor, "in in"]:
    """Upper triangular `U` with `U^T U = (H + d I)^-1`.

    From `J H J = L L^T`, `J` the reversal, `U = (J L J)^-1`: one Cholesky, one triangular
    inverse. Damping grows tenfold, then float64 is taken, where the matrix is not positive
    definite.

    Raises:
        LayerwiseError: in the name of a method, no damping makes the matrix positive definite.
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
            f"{name}, second_moment",
            allowed="finite numbers, symmetric and positive definite once damped",
            found=f"{hessian.isfinite().double().mean():.1%} finite, mean of diagonal {mean:.3g}",
            fix="calibrate on more or other text, or compute in float32",
        )
    upper = lower.flip(0, 1).contiguous()
    identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True).float()


#: columns whose errors are spread one by one; beyond them they are, together, in products
STRIP = 32


def column_feedback(
    work: Float[Tensor, "out in"],
    factor: Float[Tensor, "in in"],
    sequence: Int[Tensor, " in"],
    round_column: RoundColumn,
    block: int = 128,
    reach: Callable[[int, Tensor], None] | None = None,
) -> Int[Tensor, "out in"]:
    """Round columns in an order; the columns that remain make up for the error of each.

    Column `j` becomes `q_j` and `W[:, j:] -= (w_j - q_j) / U_jj * U[j, j:]`, at once within a
    block and block by block beyond it.

    Args:
        work: the weight.
        factor: `U`, of the columns in their order of solving; see `inverse_factor`.
        sequence: that order.
        round_column: rounds the values of a column, given its own place.
        block: columns whose updates are gathered; the result depends on it in rounding only.
        reach: told the first column of every block before it is solved, and its present weights.

    Returns:
        Codes, columns in their own order.
    """
    columns = work.shape[1]
    flow = work.T[sequence].contiguous()  # [in, out], in the order of solving
    codes = torch.empty_like(flow, dtype=torch.int16)
    errors = torch.empty_like(flow[:block])
    places, pivots = sequence.tolist(), factor.diagonal().tolist()
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        if reach is not None:
            reach(start, flow[start:stop].T)
        for first in range(start, stop, STRIP):
            last = min(first + STRIP, stop)
            corner = factor[first:last, first:last]
            for j in range(first, last):
                codes[j], value = round_column(flow[j], places[j])
                error = torch.sub(flow[j], value, out=errors[j - start]).div_(pivots[j])
                flow[j + 1 : last].addr_(corner[j - first, j - first + 1 :], error, alpha=-1)
            made = errors[first - start : last - start]
            flow[last:stop].addmm_(factor[first:last, last:stop].T, made, alpha=-1)
        flow[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    result = torch.empty_like(codes)
    result[sequence] = codes
    return result.T.contiguous()


def coordinate_descent(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    codes: Int[Tensor, "out in"],
    values: Float[Tensor, "out in"],
    round_column: RoundColumn,
) -> tuple[Int[Tensor, "out in"], Float[Tensor, "out in"]]:
    """One sweep over the columns, each put where it is best while the others stay.

    The minimum of `tr(E H E^T)` in column `j` alone is at `q_j + (E H)_j / H_jj`; the nearest
    point of a grid to it is the best one of the grid, so that the error never rises. Columns with
    large inputs come first.

    Args:
        weight: what is to be met.
        hessian: `H`, with a positive diagonal.
        codes: where the sweep starts.
        values: what these codes stand for.
        round_column: rounds the values of a column, given its own place.

    Returns:
        New codes and values.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    moment, places = hessian[order][:, order], order.tolist()
    found, at = codes.T[order].contiguous(), values.float().T[order].contiguous()  # [in, out]
    slope = moment @ (weight.float().T[order] - at)
    for start in range(0, len(places), 128):
        stop = min(start + 128, len(places))
        moved = at[start:stop].clone()
        for j in range(start, stop):
            wanted = at[j] + slope[j] / moment[j, j]
            found[j], value = round_column(wanted, places[j])
            slope[start:stop].addr_(moment[j, start:stop], value - at[j], alpha=-1)
            at[j] = value
        moved = at[start:stop] - moved
        slope[:start].addmm_(moment[:start, start:stop], moved, alpha=-1)
        slope[stop:].addmm_(moment[stop:, start:stop], moved, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return found[back].T.contiguous(), at[back].T.contiguous()


def row_errors(error: Float[Tensor, "out in"], hessian: Tensor) -> Float[Tensor, " out"]:
    """`e H e^T` of every row, in float64."""
    e = error.double()
    return ((e @ hessian.double()) * e).sum(1)
