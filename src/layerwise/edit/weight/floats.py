"""Grids of small floating-point numbers."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.floats import FLOAT_TYPES, POWERS
from layerwise.core.method import method
from layerwise.core.weight import Codebook, in_groups


@method("weight", paper="arXiv:2209.05433", aliases=("fp8", "mxfp4"), by_rows=True)
def minifloat(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    type: Literal["fp8", "mxfp8", "mxfp4"] = "fp8",
) -> Codebook:
    """Round weights to small floats: `w = scale v`, `v` of E4M3 (8 bits) or E2M1 (4 bits).

    `fp8` has a scale per row, the largest weight over 448. The microscaled types have a power of
    two per 32 columns: of the one that holds the group's largest weight and the one below it,
    which cuts that off, the one with the smaller squared error.

    Args:
        weight: `[out, in]`.
        stats: not used; follow it with `refine` (`by=feedback`) to use the inputs.
        type: fp8, mxfp8 or mxfp4.

    Returns:
        A `Codebook` record.

    Example:
        >>> w = torch.tensor([[6.0, -2.9, 0.6, 0.1]])
        >>> minifloat(w, {}, type="mxfp4").dense()
        tensor([[ 6.0000, -3.0000,  0.5000,  0.0000]])

    Reference: Micikevicius et al., 2022, arXiv:2209.05433; Rouhani et al., 2023, arXiv:2310.10537.
    """
    kind, columns = FLOAT_TYPES[type], weight.shape[1]
    values = kind.values.to(weight.device)
    blocks = in_groups(weight.float(), kind.group or columns)  # [out, groups, width]
    largest = blocks.abs().amax(-1)
    if kind.group:
        power = (largest / kind.largest).log2().ceil().clamp(-127, 127)
        power = torch.where(largest > 0, power, torch.zeros_like(power))
        tried = [torch.exp2(power), torch.exp2((power - 1).clamp_min(-127))]
        errors = [_error(blocks, scale, values) for scale in tried]
        scale = torch.where(errors[0] <= errors[1], *tried).to(POWERS)
    else:
        scale = torch.where(largest > 0, largest / kind.largest, torch.ones_like(largest))
        scale = scale.to(weight.dtype)
    codes = _nearest(blocks / scale.float()[..., None], values).flatten(1)[:, :columns]
    book = values[:, None]
    return Codebook(codes.to(torch.int16).contiguous(), scale, book, kind.group, columns)


def _nearest(x: Tensor, values: Float[Tensor, " levels"]) -> Tensor:
    return torch.bucketize(x, (values[1:] + values[:-1]) / 2)


def _error(blocks: Tensor, scale: Tensor, values: Tensor) -> Tensor:
    rounded = values[_nearest(blocks / scale[..., None], values)] * scale[..., None]
    return (blocks - rounded).square().sum(-1)
