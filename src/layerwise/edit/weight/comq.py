"""Coordinate descent: one weight after another is put where the rest of its row wants it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import method
from layerwise.core.weight import Quantized, Weight
from layerwise.edit.weight._grid import check_bits
from layerwise.edit.weight._points import Points, points_of
from layerwise.edit.weight._solve import (
    column_feedback,
    coordinate_descent,
    inverse_factor,
    must_be_moment,
    prepared,
    row_errors,
)
from layerwise.edit.weight.rtn import rtn


@method("weight", paper="arXiv:2403.07134", needs=("second_moment",), by_rows=True)
def comq(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    before: Weight,
    target: Float[Tensor, "out in"],
    bits: int = 4,
    group: int = 128,
    symmetric: bool = True,
    shrink: bool = False,
    sweeps: int = 3,
    scale_step: bool = False,
) -> Quantized:
    r"""Minimise `|| (W - Q) X ||_F^2` over one column of codes after another, in sweeps.

    Column `j` is put on the grid point nearest to `q_j + (E H)_j / H_jj`, where `E = W - Q`. The
    start is rounding to nearest; or the step before, if that left integers of the same bits and
    group, which is then never made worse.

    Args:
        weight: `[out, in]`.
        stats: `second_moment` of the inputs, `[in, in]`; without it the identity is taken.
        before: given; what the step before left.
        target: given; the last weight of the chain that was not rounded.
        bits: 2 to 8.
        group: columns that share a scale; the last group may be shorter; 0 for the whole row.
        symmetric: no zero points.
        shrink: search a smaller range per group for the least error.
        sweeps: how often all columns are visited; 0 leaves the start as it is.
        scale_step: after each sweep also put every scale where it is best, the codes held.

    Returns:
        A `Quantized` record, no row of it worse than at the start.

    Raises:
        LayerwiseError: `bits` or `group` are out of range, or not those of the step before.

    Example:
        >>> from layerwise.core.weight import Dense
        >>> w, h = torch.tensor([[0.6, 0.6, 3.0, -4.0]]), torch.eye(4)
        >>> h[0, 1] = h[1, 0] = 0.5
        >>> q = comq(w, {"second_moment": h}, before=Dense(w), target=w, bits=3, symmetric=False)
        >>> q.dense()
        tensor([[ 0.,  1.,  3., -4.]])

    Reference: Zhang et al., 2024, arXiv:2403.07134. Ours needs `H` only; all rows share the order
    of the columns, large inputs first, where theirs goes by input times weight, row by row; theirs
    starts from no error at all and so raises it in the first sweep; their code has no step for the
    scales, the paper has. The scales of a step are searched group by group.
    """
    check_bits("comq", bits, group)
    work, hessian = prepared(target, stats.get("second_moment"))
    must_be_moment(hessian, "comq")
    if isinstance(before, Quantized):
        _must_match(before, bits, group, symmetric)
        start = before
    else:
        options = {"bits": bits, "group": group, "symmetric": symmetric, "shrink": shrink}
        start = rtn(work.to(weight.dtype), {}, **options)
    record, best = start, row_errors(start.dense() - work, hessian)
    kept = record
    for _ in range(sweeps):
        points = points_of(record, "comq")
        codes = points.codes.to(torch.int16)
        codes, _ = coordinate_descent(work, hessian, codes, record.dense(), points.round_column)
        record = replace(record, codes=codes.to(torch.int8))
        record = _scaled(record, work, hessian) if scale_step else record
        error = row_errors(record.dense() - work, hessian)
        better = (error < best)[:, None]
        kept = replace(
            kept,
            codes=torch.where(better, record.codes, kept.codes),
            scale=torch.where(better, record.scale, kept.scale),
        )
        best = torch.minimum(error, best)
    return kept


def _must_match(before: Quantized, bits: int, group: int, symmetric: bool) -> None:
    found = (before.bits, before.group, before.zero is None)
    if found != (bits, group, symmetric):
        raise LayerwiseError(
            "comq, options 'bits', 'group' and 'symmetric'",
            allowed=f"those of the step before: {found}",
            found=(bits, group, symmetric),
            fix="set them alike in both steps",
        )


def _scaled(record: Quantized, weight: Tensor, hessian: Tensor) -> Quantized:
    """Every scale in turn where it is best, kept only if it is better as it is stored."""
    columns = weight.shape[1]
    width, scale = record.group or columns, record.scale.clone()
    values = record.dense()
    unit = replace(record, scale=torch.ones_like(record.scale, dtype=torch.float32)).dense()
    slope = (weight - values) @ hessian
    for at, start in enumerate(range(0, columns, width)):
        own = slice(start, start + width)
        code = unit[:, own]
        bent = code @ hessian[own]  # [out, in]
        curve = (bent[:, own] * code).sum(1)
        gain = (slope[:, own] * code).sum(1)
        old = scale[:, at].float()
        new = (old + gain / curve.clamp_min(1e-30)).to(scale.dtype).float()
        step = new - old
        better = (step * (2 * gain - step * curve) > 0) & (new > 0)
        step = torch.where(better, step, torch.zeros_like(step))
        scale[:, at] = torch.where(better, new, old).to(scale.dtype)
        slope -= step[:, None] * bent
    return replace(record, scale=scale)


@method("weight", needs=("second_moment",), by_rows=True)
def refine(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    before: Weight,
    target: Float[Tensor, "out in"],
    by: Literal["descent", "feedback"] = "descent",
    sweeps: int = 3,
    damping: float = 0.01,
) -> Weight:
    """Choose anew, by the error on the inputs, among the values that the step before left.

    Its scales stay. `feedback` rounds as GPTQ does, `descent` improves what is there as COMQ does;
    so a grid without a solver of its own (Gaussian values, trit planes, GGML's types) gets one.

    Args:
        weight: `[out, in]`.
        stats: `second_moment` of the inputs, `[in, in]`; without it nothing changes.
        before: given; what the step before left.
        target: given; the last weight of the chain that was not rounded.
        by: `descent` or `feedback`; feedback is followed by no sweep.
        sweeps: how often descent visits all columns.
        damping: of feedback, as a share of the mean of the diagonal.

    Returns:
        A record of the same kind and size, no row of it worse than it was.

    Raises:
        LayerwiseError: the step before did not round to a grid of single values.

    Example:
        >>> w, h = torch.tensor([[0.6, 0.6, 3.0, -4.0]]), torch.eye(4)
        >>> h[0, 1] = h[1, 0] = 0.5
        >>> start = rtn(w, {}, bits=3, symmetric=False)
        >>> refine(start.dense(), {"second_moment": h}, before=start, target=w).dense()
        tensor([[ 0.,  1.,  3., -4.]])

    Reference: Frantar et al., 2022, arXiv:2210.17323, and Zhang et al., 2024, arXiv:2403.07134, on
    any grid.
    """
    points = points_of(before, "refine")
    moment = stats.get("second_moment")
    if moment is None:
        return before
    work, hessian = prepared(target, moment)
    must_be_moment(hessian, "refine")
    codes = points.codes.to(torch.int16)
    best = row_errors(before.dense() - work, hessian)
    trial = codes
    for _ in range(sweeps if by == "descent" else 1):
        if by == "feedback":
            trial = _fed_back(work, hessian, points, damping)
        else:
            held = points.record(trial).dense()
            trial, _ = coordinate_descent(work, hessian, trial, held, points.round_column)
        error = row_errors(points.record(trial).dense() - work, hessian)
        codes = torch.where((error < best)[:, None], trial, codes)
        best = torch.minimum(error, best)
    return points.record(codes)


def _fed_back(work: Tensor, hessian: Tensor, points: Points, damping: float) -> Tensor:
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damping, "refine")
    return column_feedback(work, factor, order, points.round_column)
