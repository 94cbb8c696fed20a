"""Grids of small floating-point numbers."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.floats import FLOAT_TYPES, MOST, POWERS, SHARED, SMALL, FloatType
from layerwise.core.method import method
from layerwise.core.weight import Codebook, in_groups


@method("weight", paper="arXiv:2209.05433", aliases=("fp8", "mxfp4", "nvfp4"), by_rows=True)
def minifloat(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    type: Literal["fp8", "mxfp8", "mxfp4", "nvfp4"] = "fp8",
) -> Codebook:
    """Round weights to small floats: `w = scale v`, `v` of E4M3 (8 bits) or E2M1 (4 bits).

    `fp8` has a scale per row, the largest weight over 448. The microscaled types have a power of
    two per 32 columns: of the one that holds the group's largest weight and the one below it,
    which cuts that off, the one with the smaller squared error. `nvfp4` has an E4M3 number per 16
    columns, over 256 for the whole matrix (less where a weight is above 10.5, so that the engines
    that fuse matrices find one number): of the scales that make 6 and 4 of the group's largest
    weight, the one with the smaller squared error.

    Args:
        weight: `[out, in]`.
        stats: not used; follow it with `refine` (`by=feedback`) to use the inputs.
        type: fp8, mxfp8, mxfp4 or nvfp4.

    Returns:
        A `Codebook` record.

    Example:
        >>> w = torch.tensor([[6.0, -2.9, 0.6, 0.1]])
        >>> minifloat(w, {}, type="mxfp4").dense()
        tensor([[ 6.0000, -3.0000,  0.5000,  0.0000]])

    Reference: Micikevicius et al., 2022, arXiv:2209.05433; Rouhani et al., 2023, arXiv:2310.10537;
        of NVFP4, Cook et al., 2025, arXiv:2512.02010.
    """
    kind, columns = FLOAT_TYPES[type], weight.shape[1]
    values = kind.values.to(weight.device)
    blocks = in_groups(weight.float(), kind.group or columns)  # [out, groups, width]
    largest = blocks.abs().amax(-1)
    shared = torch.ones((), device=weight.device)
    if kind.scale is POWERS:
        power = (largest / kind.largest).log2().ceil().clamp(-127, 127)
        power = torch.where(largest > 0, power, torch.zeros_like(power))
        scale = _better(blocks, [torch.exp2(power), torch.exp2((power - 1).clamp_min(-127))], kind)
    elif kind.scale is SMALL:
        room = (MOST * kind.largest / largest.amax().clamp_min(1e-30)).log2().floor()
        shared = torch.exp2(room).clamp_max(SHARED)
        tried = [(largest * shared / most).clamp(TINY, MOST).to(SMALL) for most in NVFP4_ENDS]
        scale = _better(blocks * shared, [each.float() for each in tried], kind)
    else:
        scale = torch.where(largest > 0, largest / kind.largest, torch.ones_like(largest))
    scale = scale.to(kind.scale or weight.dtype)
    codes = _nearest(blocks * shared / scale.float()[..., None], values).flatten(1)[:, :columns]
    book = values[:, None] / shared
    return Codebook(codes.to(torch.int16).contiguous(), scale, book, kind.group, columns)


#: the smallest E4M3 number that is not 0
TINY = 2.0**-9
#: what the largest weight of a group becomes: numbers of E2M1 are furthest apart between 4 and 6
NVFP4_ENDS = (6.0, 4.0)


def _better(blocks: Tensor, tried: Sequence[Tensor], kind: FloatType) -> Tensor:
    """Of two scales for each group, the one with the smaller squared error; the first if equal."""
    values = kind.values.to(blocks.device)
    errors = [_error(blocks, scale, values) for scale in tried]
    return torch.where(errors[0] <= errors[1], *tried)


def _nearest(x: Tensor, values: Float[Tensor, " levels"]) -> Tensor:
    return torch.bucketize(x, (values[1:] + values[:-1]) / 2)


def _error(blocks: Tensor, scale: Tensor, values: Tensor) -> Tensor:
    rounded = values[_nearest(blocks / scale[..., None], values)] * scale[..., None]
    return (blocks - rounded).square().sum(-1)
